"""People at a browser, hubs over their API, and code that runs inside a server."""

import base64
import html
import json
import re
import time
import uuid
from datetime import datetime
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import requests
import websocket

from refstack.process import wait_for


class Refused(Exception):
    """A page said no. Its text says why."""


class Browser:
    """A browser as far as logging in needs one."""

    def __init__(self):
        self.session = requests.Session()

    def open(self, url, data=None, method=None):
        """Follow redirects to a page and return it."""
        response = self._request(method or ("POST" if data else "GET"), url, data)
        for _ in range(20):
            if not response.is_redirect:
                return response
            url = urljoin(url, response.headers["Location"])
            response = self._request("GET", url)
        raise Refused(f"redirected in circles at {url}")

    def code(self, url, user, callback):
        """Log in at Keycloak itself, and take the code instead of bringing it to the callback."""
        form = re.search(r'<form[^>]*id="kc-form-login"[^>]*action="([^"]+)"', self.open(url).text)
        response = self._request("POST", html.unescape(form[1]), {"username": user, "password": f"{user}-pw"})
        location = response.headers["Location"]
        assert location.startswith(callback), location
        return parse_qs(urlsplit(location).query)["code"][0]

    def _request(self, method, url, data=None):
        response = self.session.request(method, url, data=data, allow_redirects=False, timeout=60)
        # Keycloak marks its cookies Secure; a browser on plain http to the
        # loopback address takes them, requests doesn't.
        for cookie in self.session.cookies:
            cookie.secure = False
        return response

    def log_in(self, hub_url, user, password=None):
        """Log in at a hub through Keycloak's form and return the hub's page."""
        page = self.open(hub_url + "/hub/oauth_login?next=%2Fhub%2Fhome")
        form = re.search(r'<form[^>]*id="kc-form-login"[^>]*action="([^"]+)"', page.text)
        if form:
            page = self.open(html.unescape(form[1]), {"username": user, "password": password or f"{user}-pw"})
        if page.status_code != 200 or urlsplit(page.url).path != "/hub/home":
            raise Refused(f"{page.status_code} at {page.url}: {text_of(page)}")
        return page

    def log_out(self, issuer):
        """Log out at Keycloak itself, and say yes when it asks."""
        page = self.open(f"{issuer}/protocol/openid-connect/logout?client_id=jupyterhub")
        form = re.search(r'<form[^>]*action="([^"]*logout-confirm[^"]*)".*?</form>', page.text, flags=re.S)
        code = re.search(r'name="session_code" value="([^"]*)"', form[0])
        page = self.open(urljoin(page.url, html.unescape(form[1])), {"session_code": code[1], "confirmLogout": "Logout"})
        if page.status_code != 200:
            raise Refused(f"{page.status_code} at {page.url}: {text_of(page)}")


def text_of(page):
    """What a person reads of an HTML page, roughly."""
    text = re.sub(r"<(script|style|head)\b.*?</\1>", " ", page.text, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()


class Hub:
    """One of the stack's hubs, over its REST API."""

    def __init__(self, stack, name):
        self.url = stack.settings["hubs"][name]["url"]
        self.prefix = f"{stack.settings['name']}-{name}"
        self.admin = stack.secret(f"{name}-api-token")

    def api(self, method, path, token=None, **kwargs):
        headers = {"Authorization": f"token {token or self.admin}"}
        return requests.request(method, f"{self.url}/hub/api{path}", headers=headers, timeout=120, **kwargs)

    def token_of(self, user):
        """A token with all of a user's rights."""
        response = self.api("POST", f"/users/{user}/tokens", json={})
        assert response.status_code == 201, response.text
        return response.json()["token"]

    def auth_state(self, user):
        """A user's auth_state as an administrator reads it. It passes through the proxy."""
        return self.api("GET", f"/users/{user}").json().get("auth_state")

    def spawn(self, user, server="", token=None):
        """Start a server and return it when it is ready."""
        path = f"/users/{user}/servers/{server}" if server else f"/users/{user}/server"
        response = self.api("POST", path, token)
        if response.status_code not in (201, 202):
            raise Refused(f"{response.status_code}: {response.text}")
        wait_for(f"server of {user}", lambda: self.ready(user, server), 120)
        return Server(self, user, server)

    def ready(self, user, server=""):
        servers = self.api("GET", f"/users/{user}").json()["servers"]
        return servers.get(server, {}).get("ready")

    def stop_server(self, user, server=""):
        path = f"/users/{user}/servers/{server}" if server else f"/users/{user}/server"
        response = self.api("DELETE", path)
        assert response.status_code in (202, 204), response.text
        wait_for(f"end of the server of {user}",
                 lambda: server not in self.api("GET", f"/users/{user}").json()["servers"])


class Server:
    """A running single-user server."""

    def __init__(self, hub, user, name=""):
        self.hub, self.user, self.name = hub, user, name
        self.token = hub.token_of(user)
        self.url = f"{hub.url}/user/{user}/" + (f"{quote(name)}/" if name else "")
        self.container = f"{hub.prefix}-{user}" + (f"--{name}" if name else "")
        self._kernel = None

    def api(self, method, path, **kwargs):
        headers = {"Authorization": f"token {self.token}"}
        return requests.request(method, self.url + "api/" + path, headers=headers, timeout=60, **kwargs)

    def put_bytes(self, path, content):
        """Write a file in the user's home."""
        response = self.api("PUT", f"contents/{path}", json={
            "type": "file", "format": "base64", "content": base64.b64encode(content).decode()})
        assert response.status_code in (200, 201), response.text

    def run(self, code):
        """Run Python code in the server's kernel and return what it printed."""
        if self._kernel is None:
            response = self.api("POST", "kernels", json={"name": "python3"})
            assert response.status_code == 201, response.text
            self._kernel = response.json()["id"]
        session = uuid.uuid4().hex
        ws = websocket.create_connection(
            f"ws{self.url.removeprefix('http')}api/kernels/{self._kernel}/channels?session_id={session}",
            header={"Authorization": f"token {self.token}"}, timeout=120)
        try:
            return _execute(ws, session, code)
        finally:
            ws.close()

    def end_kernel(self):
        """End the kernel and with it all that runs in it."""
        self.api("DELETE", f"kernels/{self._kernel}").raise_for_status()
        self._kernel = None

    def sh(self, command):
        """Run a shell command in the kernel; returns (exit code, stdout and stderr)."""
        out = self.run(
            "import json, subprocess\n"
            f"done = subprocess.run(['sh', '-c', {command!r}], capture_output=True, text=True)\n"
            "print(json.dumps([done.returncode, done.stdout + done.stderr]))")
        return tuple(json.loads(out))

    def ask(self, path="/v1/token/keycloak"):
        """Ask the broker as JSON, from inside; returns an Answer."""
        code, out = self.sh(
            "curl -s -w '\\n%{http_code} %header{retry-after}' --unix-socket /run/tokenbroker/broker.sock "
            f"'http://localhost{path}'")
        body, _, last = out.rpartition("\n")
        status, _, retry_after = last.partition(" ")
        return Answer(int(status), json.loads(body) if body else {}, retry_after) if code == 0 else Answer(0, {}, "")


class Answer:
    """What the broker answered; status 0: it was not there."""

    def __init__(self, status, body, retry_after):
        self.status, self.body, self.retry_after = status, body, retry_after

    @property
    def code(self):
        return self.body.get("code")

    @property
    def token(self):
        assert self.status == 200, self
        return self.body["access_token"]

    def __repr__(self):
        return f"{self.status} {self.body}"


def claims(token):
    """The claims of a JWT, unverified."""
    payload = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def wait_until_expired(*tokens):
    """Wait until JWTs have ended, also for those who only know their expires_in.

    Keycloak cuts exp to whole seconds, and expires_in counts from the answer.
    """
    end = max(claims(token)["exp"] for token in tokens)
    wait_for("end of the tokens", lambda: time.time() > end + 1.5, 90)


def since_1970(text):
    """The seconds of a time as Go writes it, which may have more digits than Python reads."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


class Keycloak:
    """The provider, past the counting proxy: as its administrator, and as a service that is sent tokens."""

    def __init__(self, stack):
        self.stack = stack
        self.base = f"http://127.0.0.1:{stack.settings['keycloak_port']}"
        self.realm = f"{self.base}/realms/lab/protocol/openid-connect"

    def introspect(self, token, service="storage"):
        """What a service learns of a token that it was sent."""
        response = requests.post(f"{self.realm}/token/introspect", data={"token": token},
                                 auth=(service, self.stack.secret(f"{service}-secret")), timeout=30)
        response.raise_for_status()
        return response.json()

    def userinfo(self, token):
        return requests.get(f"{self.realm}/userinfo", headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def admin(self, method, path, **kwargs):
        token = requests.post(f"{self.base}/realms/master/protocol/openid-connect/token", timeout=30, data={
            "grant_type": "password", "client_id": "admin-cli", "username": "admin",
            "password": self.stack.secret("keycloak-admin")}).json()["access_token"]
        response = requests.request(method, f"{self.base}/admin/realms/lab{path}", timeout=30,
                                    headers={"Authorization": f"Bearer {token}"}, **kwargs)
        response.raise_for_status()
        return response

    def token_life(self, seconds):
        """Gives the realm's access tokens another life, from the next one on."""
        self.admin("PUT", "", json={**self.admin("GET", "").json(), "accessTokenLifespan": seconds})

    def end_sessions(self, user):
        """What an administrator does who clicks on "Sign out"."""
        id = self.admin("GET", f"/users?username={user}&exact=true").json()[0]["id"]
        self.admin("POST", f"/users/{id}/logout")


def _execute(ws, session, code):
    id = uuid.uuid4().hex
    ws.send(json.dumps({
        "header": {"msg_id": id, "msg_type": "execute_request", "username": "", "session": session, "version": "5.3"},
        "parent_header": {}, "metadata": {}, "channel": "shell",
        "content": {"code": code, "silent": False, "store_history": False, "user_expressions": {},
                    "allow_stdin": False, "stop_on_error": True},
    }))
    printed, replied, idle = [], False, False
    while not (replied and idle):
        message = json.loads(ws.recv())
        if message.get("parent_header", {}).get("msg_id") != id:
            continue
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "stream":
            printed.append(content["text"])
        elif kind == "error":
            raise AssertionError("in the kernel: " + re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"])))
        elif kind == "execute_reply":
            replied = True
        elif kind == "status" and content["execution_state"] == "idle":
            idle = True
    return "".join(printed)
