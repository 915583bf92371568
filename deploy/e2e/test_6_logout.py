"""Users who log out at Keycloak, which tells the broker so (OpenID Connect Back-Channel Logout)."""

import json
import threading
import time

from people import Browser
from refstack.process import wait_for

SLACK = 5  # seconds: the machine may be busy with other things

# Asks for a token each 100 ms until it is refused: [when it got the last one, when it was refused, with what].
ASK = """
import json, subprocess, time
last, refused, code = 0, 0, ""
end = time.time() + 90
while time.time() < end:
    asked = time.time()
    out = subprocess.run(["curl", "-s", "--unix-socket", "/run/tokenbroker/broker.sock", "http://localhost/v1/token/keycloak"],
                         capture_output=True, text=True).stdout
    answer = json.loads(out or "{}")
    if "access_token" in answer:
        last = time.time()
    elif "code" in answer:
        refused, code = time.time(), answer["code"]
        break
    time.sleep(max(0, 0.1 - (time.time() - asked)))
print(json.dumps([last, refused, code]))
"""


def seconds_until_refused(server, logout):
    """How long after the answer to logout the last token came to a notebook that asks all the time."""
    told = []
    asking = threading.Thread(target=lambda: told.append(json.loads(server.run(ASK))))
    asking.start()
    time.sleep(2)  # it asks by then
    logout()
    answered = time.time()
    asking.join()
    last, refused, code = told[0]
    assert last and code == "login_required", told
    return last - answered, refused - answered


def test_a_logout_at_keycloak_ends_the_tokens_of_that_session(stack, hub, keycloak, audit):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    carol = hub.spawn("carol")
    try:
        last, refused = seconds_until_refused(carol, lambda: browser.log_out(stack.issuer))
        print(f"logout at Keycloak → last token {last:+.2f} s, refusal {refused:+.2f} s after its answer")
        assert refused < SLACK

        # The same kernel goes on after a login, also while another browser logs out.
        first, second = Browser(), Browser()
        first.log_in(hub.url, "carol")
        second.log_in(hub.url, "carol")
        wait_for("tokens again", lambda: carol.ask().status == 200, 30)
        heard = len(audit("provider_logout"))
        first.log_out(stack.issuer)
        wait_for("Keycloak's word of it", lambda: len(audit("provider_logout")) > heard, SLACK)
        assert "looked at" in audit("provider_logout")[-1], audit("provider_logout")[-1]
        time.sleep(6)  # for the looks
        assert carol.ask().status == 200, "the session that the tokens are of lives on"

        # An administrator ends several sessions at once; Keycloak tells of one of them.
        Browser().log_in(hub.url, "carol")
        wait_for("tokens again", lambda: carol.ask().status == 200, 30)
        last, refused = seconds_until_refused(carol, lambda: keycloak.end_sessions("carol"))
        print(f"an administrator's logout → last token {last:+.2f} s, refusal {refused:+.2f} s after Keycloak's answer")
        assert refused < 5 + SLACK  # the second look
    finally:
        hub.stop_server("carol")
