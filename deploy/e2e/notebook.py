"""A notebook in which somebody works while his rights change: it asks for a token ten times a second, all the time,
and watches. What it was told, and when, is asked of it afterwards."""

import io
import json
import time
import zipfile

from people import Browser, Server, claims
from refstack.process import wait_for
from refstack.stack import CHECKOUT, EVENTS_EVERY

STORAGE = "/v1/token/keycloak?audience=storage"
BY_EVENTS = EVENTS_EVERY + 1  # seconds: what is promised where Keycloak's events are read
MARGIN = 5  # seconds that two busy cores may take on top of what is promised

# What runs in the notebook.
ASK = """
import threading, time
import tokenbroker

answers = [(time.time(), "nothing yet", "")]

def ask():
    while True:
        try:
            tokenbroker.token("keycloak", audience="storage")
            answers.append((time.time(), "token", ""))
        except tokenbroker.TokenBrokerError as e:
            answers.append((time.time(), e.code, str(e)))
        time.sleep(0.1)

threading.Thread(target=ask, daemon=True).start()

def until(good, since, seconds):
    while time.time() < since + seconds:
        ours = [(at - since, code) for at, code, _ in list(answers) if at > since]
        for i, (at, code) in enumerate(ours):
            if good(code):
                return code, at, max([0.0] + [t for t, c in ours[:i] if c == "token"])
        time.sleep(0.05)
    return answers[-1][1] + ", still", seconds, seconds
"""


def python_client(server):
    """Puts our Python package into a server's home, as one file; returns the code that makes it importable."""
    package = io.BytesIO()
    source = CHECKOUT / "client/python"
    with zipfile.ZipFile(package, "w") as z:
        for path in sorted(source.rglob("*.py")):
            if "tests" not in path.relative_to(source).parts:
                z.write(path, path.relative_to(source))
    server.put_bytes("tokenbroker.zip", package.getvalue())
    return "import sys; sys.path.insert(0, '/home/jovyan/tokenbroker.zip')\n"


class Notebook:
    """One user's, while something is done to him."""

    def __init__(self, hub, keycloak, user="carol"):
        self.hub, self.keycloak, self.user = hub, keycloak, user
        self.id = keycloak.admin("GET", f"/users?username={user}&exact=true").json()[0]["id"]
        self.role = keycloak.admin("GET", "/roles/researcher").json()
        Browser().log_in(hub.url, user)
        self.start()

    def start(self):
        """Starts the server, or finds it running, and has it ask from then on."""
        ready = self.hub.ready(self.user)
        self.server = Server(self.hub, self.user) if ready else self.hub.spawn(self.user)
        self.server.run(python_client(self.server) + ASK)

    def stop(self):
        if self.hub.ready(self.user):
            self.hub.stop_server(self.user)

    def until(self, good, since, within):
        """(code, first such answer, last token before it), in seconds after since."""
        return json.loads(self.server.run(
            "import json\n"
            f"print(json.dumps(until(lambda code: code {good}, {since}, {within + MARGIN})))"))

    def told_within(self, seconds):
        """All that the notebook is told in the next seconds: codes, and "token"."""
        return set(json.loads(self.server.run(
            "import json\n"
            f"since = time.time(); time.sleep({seconds})\n"
            "print(json.dumps([code for at, code, _ in list(answers) if at > since]))")))

    def has_tokens(self):
        code, after, _ = self.until("== 'token'", time.time(), 60)
        assert code == "token", (code, after)

    def refused(self, what, do, within=BY_EVENTS):
        """What the notebook is told after something was done."""
        self.has_tokens()
        do()
        code, first, last = self.until("!= 'token'", time.time(), within)
        print(f"{what} → the last token {last:.2f} s after the answer, then {code} at {first:.2f} s; promised {within} s")
        assert code in ("denied", "login_required", "revoked"), code
        return code

    def served(self, what, do, within=BY_EVENTS):
        """The notebook gets tokens again, without a login or a restart."""
        do()
        code, first, _ = self.until("== 'token'", time.time(), within)
        print(f"{what} → a token {first:.2f} s after the answer")
        assert code == "token", code

    def admin(self, method, path, **kwargs):
        return self.keycloak.admin(method, f"/users/{self.id}{path}", **kwargs)

    def has_role(self, yes, role=None):
        self.admin("POST" if yes else "DELETE", "/role-mappings/realm", json=[role or self.role])

    def log_in(self):
        Browser().log_in(self.hub.url, self.user)
        self.has_tokens()

    def wait_for_long_tokens(self):
        """Waits for a token that outlives what is measured: else its end alone would show the change."""
        wait_for("a token of the new life",
                 lambda: claims(self.server.ask(STORAGE).token)["exp"] - time.time() > 200, 90)
