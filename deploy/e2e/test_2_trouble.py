"""Tokens end, parts restart, the provider is slow or away: nobody is logged out, nothing is lost."""

import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import CLIENT_GONE
from leaks import auth_states
from people import Browser, Refused, claims, wait_until_expired
from refstack.docker import inspect
from refstack.process import wait_for
from refstack.stack import BROKER

STORAGE = "/v1/token/keycloak?audience=storage"
REFRESH, EXCHANGE, CODE = "token/refresh_token", "token/token-exchange", "token/authorization_code"


def hub_token(stack, user):
    """The access token that the hub has of a user."""
    return auth_states(stack, BROKER)[user]["access_token"]


def test_eight_requests_at_the_hub_after_expiry_make_one_refresh(stack, hub, alice, faults):
    old = hub_token(stack, "alice")
    wait_until_expired(old, alice.ask(STORAGE).token)
    before = faults.count(REFRESH, "alice")
    with ThreadPoolExecutor(8) as pool:
        statuses = [r.status_code for r in pool.map(lambda _: hub.api("GET", "/user", alice.token), range(8))]
    assert statuses == [200] * 8
    assert faults.count(REFRESH, "alice") == before + 1
    new = hub_token(stack, "alice")
    assert new != old and claims(new)["exp"] > time.time()
    assert auth_states(stack, BROKER)["alice"]["refresh_token"].startswith("tbh_")


def test_six_requests_in_the_container_after_expiry_make_one_refresh_and_one_exchange(stack, alice, faults):
    wait_until_expired(hub_token(stack, "alice"), alice.ask(STORAGE).token)
    refreshes, exchanges = faults.count(REFRESH, "alice"), faults.count(EXCHANGE, "alice")
    code, out = alice.sh(
        "for i in 1 2 3 4 5 6; do access-token keycloak --audience storage >/tmp/token.$i & done; wait; "
        "cat /tmp/token.* | sort | uniq -c | wc -l; cat /tmp/token.* | wc -l; rm /tmp/token.*")
    assert code == 0 and out.split() == ["1", "6"], f"one token, six times: {out}"
    assert faults.count(REFRESH, "alice") == refreshes + 1
    assert faults.count(EXCHANGE, "alice") == exchanges + 1


@pytest.mark.parametrize("trouble", [{"drop": True}, {"status": 503, "body": "<html>maintenance</html>"}],
                         ids=["no connection", "a page of HTML"])
def test_with_the_provider_down_valid_tokens_are_served_and_nobody_is_logged_out(stack, hub, alice, faults, trouble):
    browser = Browser()
    browser.log_in(hub.url, "alice")
    codes = faults.count(CODE)
    token = alice.ask(STORAGE).token
    faults.add(**trouble)
    assert alice.ask(STORAGE).token == token, "a valid token needs no provider"

    wait_until_expired(token, hub_token(stack, "alice"))
    down = alice.ask(STORAGE)
    assert (down.status, down.code) == (503, "provider_down"), down
    assert int(down.retry_after) > 0 and down.body["next"]
    assert "maintenance" not in str(down.body)
    assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home", "the page stays up"
    assert hub.api("GET", "/user", alice.token).status_code == 200
    named = hub.spawn("alice", "meanwhile", alice.token)
    assert named.ask(STORAGE).status == 503, "a server starts, and gets tokens when there are some"

    faults.clear()
    wait_for("a token after the outage", lambda: alice.ask(STORAGE).status == 200, 40)
    assert named.ask(STORAGE).status == 200
    hub.stop_server("alice", "meanwhile")
    assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
    assert faults.count(CODE) == codes, "nobody had to log in again"


def test_with_redis_down_nothing_is_spent_and_nobody_is_logged_out(stack, hub, alice, faults):
    browser = Browser()
    browser.log_in(hub.url, "alice")
    codes, refreshes = faults.count(CODE), faults.count(REFRESH, "alice")
    wait_until_expired(alice.ask(STORAGE).token, hub_token(stack, "alice"))
    stack.stop("redis")
    try:
        down = alice.ask(STORAGE)
        assert (down.status, down.code) == (503, "unavailable"), down
        assert int(down.retry_after) > 0
        assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
        with pytest.raises(Refused):
            Browser().log_in(hub.url, "bob")
        assert faults.count(REFRESH, "alice") == refreshes, "no refresh token was spent"
    finally:
        stack.start("redis")
    wait_for("a token after the outage", lambda: alice.ask(STORAGE).status == 200, 30)
    assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
    assert faults.count(REFRESH, "alice") == refreshes + 1 and faults.count(CODE) <= codes + 1


def test_a_restart_of_the_broker_costs_a_retry(stack, hub, alice, faults):
    browser = Browser()
    browser.log_in(hub.url, "alice")
    codes = faults.count(CODE)
    inode = alice.run("import os; print(os.stat('/run/tokenbroker').st_ino)")
    stack.stop("broker")
    assert alice.ask(STORAGE).status == 0
    code, said = alice.sh("access-token keycloak --audience storage")
    assert code == 5 and "broker" in said, said
    assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home", "nobody is logged out"
    alice.run("import subprocess; waiting = subprocess.Popen("
              "['access-token', 'keycloak', '--audience', 'storage', '--wait=60s'], stdout=subprocess.PIPE, text=True)")
    stack.start("broker")
    assert alice.run("print(waiting.communicate()[0])").startswith("eyJ"), "who waited is served"
    assert alice.ask(STORAGE).status == 200
    assert alice.run("import os; print(os.stat('/run/tokenbroker').st_ino)") == inode
    assert faults.count(CODE) == codes


def test_a_broker_killed_amid_a_refresh_loses_nothing(stack, alice, faults):
    codes = faults.count(CODE)
    wait_until_expired(alice.ask(STORAGE).token, hub_token(stack, "alice"))
    before = faults.count(REFRESH, "alice")
    faults.add(kind=REFRESH, user="alice", delay="60s")
    alice.run("import subprocess; asking = subprocess.Popen(['access-token', '--audience', 'storage', '--wait=120s'],"
              " stdout=subprocess.PIPE, text=True)")
    wait_for("a refresh under way", lambda: faults.count(REFRESH, "alice") > before)
    stack.processes["broker"].stop(signal.SIGKILL)
    wait_for("the end of its call", lambda: faults.count(REFRESH, "alice", CLIENT_GONE))
    faults.clear()
    stack.start("broker")
    # The lease of the dead one has to run out first.
    assert alice.run("print(asking.communicate()[0])").startswith("eyJ")
    assert faults.count(CODE) == codes


def test_an_answer_lost_on_the_way_costs_a_login_at_a_strict_provider_and_no_restart(stack, hub, alice, faults):
    container = inspect(alice.container)[0]["Id"]
    wait_until_expired(alice.ask(STORAGE).token, hub_token(stack, "alice"))
    faults.add(kind=REFRESH, user="alice", lose=True, times=1)
    lost = wait_for("the end of the session", lambda: (a := alice.ask(STORAGE)).status == 409 and a, 60)
    assert lost.code == "login_required" and lost.body["next"], lost
    Browser().log_in(hub.url, "alice")
    assert alice.ask(STORAGE).status == 200
    assert inspect(alice.container)[0]["Id"] == container


def test_a_restart_of_the_hub_changes_nothing_for_running_servers(stack, hub, alice, faults, admin):
    codes = faults.count(CODE)
    container = inspect(alice.container)[0]["Id"]
    stack.stop("hub-broker")
    assert alice.ask(STORAGE).status == 200, "the hub is not on this path"
    stack.start("hub-broker")
    wait_for("alice's server at the hub", lambda: hub.ready("alice"))
    assert hub.api("GET", "/user", alice.token).status_code == 200
    assert alice.ask(STORAGE).status == 200
    assert inspect(alice.container)[0]["Id"] == container
    (registration,) = [r for r in admin("sessions", "list", "--user", "alice")["registrations"] if not r.get("server")]
    assert registration["state"] == "bound"
    assert faults.count(CODE) == codes


def test_with_the_broker_down_a_spawn_is_refused_in_words_and_works_afterwards(stack, hub, bob):
    browser = Browser()
    browser.log_in(hub.url, "bob")
    stack.stop("broker")
    try:
        with pytest.raises(Refused, match="503.*token broker is unavailable"):
            hub.spawn("bob", "later")
        with pytest.raises(Refused, match="token broker is unavailable"):
            Browser().log_in(hub.url, "carol")
        assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
    finally:
        stack.start("broker")
    named = hub.spawn("bob", "later")
    assert named.ask("/v1/token/keycloak?scope=openid").status == 200
    hub.stop_server("bob", "later")


def test_a_session_ended_at_the_provider_ends_here_and_a_login_revives_the_running_server(stack, hub, keycloak):
    Browser().log_in(hub.url, "carol")
    carol = hub.spawn("carol")
    try:
        container = inspect(carol.container)[0]["Id"]
        token = carol.ask(STORAGE).token
        keycloak.end_sessions("carol")
        wait_until_expired(token, hub_token(stack, "carol"))
        ended = carol.ask(STORAGE)
        assert (ended.status, ended.code) == (409, "login_required"), ended
        Browser().log_in(hub.url, "carol")
        assert carol.ask(STORAGE).status == 200
        assert inspect(carol.container)[0]["Id"] == container, "no restart was needed"
    finally:
        hub.stop_server("carol")


def test_a_disconnected_user_gets_nothing_from_then_on_until_a_new_login(hub, bob, admin):
    path = "/v1/token/keycloak?scope=openid"
    assert bob.ask(path).status == 200
    answer = admin("users", "disconnect", "bob")
    assert answer["disconnected"]
    cut = bob.ask(path)
    assert (cut.status, cut.code) == (403, "revoked"), cut
    with pytest.raises(Refused, match="403|409"):
        hub.spawn("bob", "more")
    Browser().log_in(hub.url, "bob")
    assert bob.ask(path).status == 200


def test_a_role_taken_away_is_gone_with_the_next_token_and_comes_back_without_a_login(stack, hub, keycloak, faults):
    Browser().log_in(hub.url, "carol")
    carol = hub.spawn("carol")
    role = keycloak.admin("GET", "/roles/researcher").json()
    id = keycloak.admin("GET", "/users?username=carol&exact=true").json()[0]["id"]
    try:
        token = carol.ask(STORAGE).token
        keycloak.admin("DELETE", f"/users/{id}/role-mappings/realm", json=[role])
        wait_until_expired(token, hub_token(stack, "carol"))
        denied = carol.ask(STORAGE)
        assert (denied.status, denied.code) == (403, "denied"), denied
        keycloak.admin("POST", f"/users/{id}/role-mappings/realm", json=[role])
        codes = faults.count(CODE)

        def back():
            # What brings it is the next refresh, here one by the hub.
            assert hub.api("GET", "/user", carol.token).status_code == 200
            return carol.ask(STORAGE).status == 200

        wait_for("the role's return", back, 60)
        assert faults.count(CODE) == codes
    finally:
        hub.stop_server("carol")


def test_while_one_users_refresh_hangs_anothers_login_is_as_fast_as_before(stack, hub, alice, bob, faults):
    def login_time():
        browser, start = Browser(), time.monotonic()
        browser.log_in(hub.url, "bob")
        return time.monotonic() - start

    alone = statistics.median(login_time() for _ in range(5))
    wait_until_expired(alice.ask(STORAGE).token, hub_token(stack, "alice"))
    before = faults.count(REFRESH, "alice")
    faults.add(kind=REFRESH, user="alice", delay="25s")
    done = threading.Event()

    def ask_again_and_again():
        while not done.is_set():
            assert hub.api("GET", "/user", alice.token).status_code == 200

    with ThreadPoolExecutor(14) as pool:
        asking = [pool.submit(ask_again_and_again) for _ in range(14)]
        try:
            wait_for("a hanging refresh", lambda: faults.count(REFRESH, "alice") > before)
            beside = statistics.median(login_time() for _ in range(5))
            assert faults.count(REFRESH, "alice") == before + 1, "it hangs still, and nobody started another"
            assert bob.ask("/v1/token/keycloak?scope=openid").status == 200
        finally:
            done.set()
            faults.clear()
        for a in asking:
            a.result()
    print(f"bob's login: {alone:.3f} s alone, {beside:.3f} s beside a hanging refresh: {beside / alone:.1f} times")
    # Without the broker it is 30 to 90 times: the hub's ten connections wait.
    assert beside < 10 * alone
    wait_for("alice's token", lambda: alice.ask(STORAGE).status == 200)
