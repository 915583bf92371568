"""A real hub with a real OAuthenticator: login, refresh, spawn and stop.

The provider and the broker are stand-ins, and there is no container; the
reference stack has those for real.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from hub_standin import FROZEN, StandIn
from tokenbroker_hub import hooks, relay

HERE = Path(__file__).parent
TOKEN_PATH = "/oauth2/token/keycloak"


class Provider:
    """Sends everybody straight back with a code, as whoever user is."""

    def __init__(self):
        self.user = "alice"
        self.userinfo = 0  # how often it was asked
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                url = urllib.parse.urlsplit(self.path)
                query = dict(urllib.parse.parse_qsl(url.query))
                if url.path == "/authorize":
                    assert query["code_challenge_method"] == "S256"
                    code = urllib.parse.urlencode({"code": f"the-code-of-{provider.user}", "state": query["state"]})
                    self.send_response(302)
                    self.send_header("Location", query["redirect_uri"] + "?" + code)
                    self.end_headers()
                    return
                provider.userinfo += 1
                name = self.headers["Authorization"].removeprefix("Bearer access-token-of-").partition(".")[0]
                body = json.dumps({"name": name}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def token(user, number=1):
    return {
        "access_token": f"access-token-of-{user}.{number}",
        "token_type": "Bearer",
        "expires_in": 60,
        "scope": "openid",
        "refresh_token": f"tbh_handle-of-{user}",
    }


def exchange(body):
    form = dict(urllib.parse.parse_qsl(body))
    return token(form["code"].removeprefix("the-code-of-"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class World:
    """A hub, its broker and its provider."""

    def __init__(self, directory, basic_auth):
        self.directory = directory
        self.provider = Provider()
        self.broker = StandIn(directory / "hub.sock").start()
        self.usual = dict(self.broker.answers)
        self.settings = {
            "package": str(HERE.parent),
            "homes": str(directory / "homes"),
            "public_port": free_port(),
            "hub_port": free_port(),
            "server_port": free_port(),
            "api_token": secrets.token_hex(16),
            "idp": self.provider.url,
            "basic_auth": basic_auth,
            "socket": self.broker.path,
        }
        self.url = f"http://127.0.0.1:{self.settings['hub_port']}"
        self.process = None

    def env(self, key="00" * 32):
        env = {**os.environ, "TEST_WORLD": json.dumps(self.settings), "no_proxy": "*"}
        env.pop("JUPYTERHUB_CRYPT_KEY", None)
        return {**env, "JUPYTERHUB_CRYPT_KEY": key} if key else env

    def jupyterhub(self, *args):
        return [sys.executable, "-m", "jupyterhub", *args, "-f", str(HERE / "hub_config.py")]

    def start(self):
        with open(self.directory / "hub.log", "ab") as log:
            self.process = subprocess.Popen(
                self.jupyterhub("--debug"), cwd=self.directory, env=self.env(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()[-4000:]
            try:
                if requests.get(self.url + "/hub/health", timeout=5).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def log(self):
        return (self.directory / "hub.log").read_text()

    def api(self, method, path, **kwargs):
        headers = {"Authorization": "token " + self.settings["api_token"]}
        return requests.request(method, self.url + "/hub/api" + path, headers=headers, timeout=60, **kwargs)

    def login(self, user):
        """A browser that has gone through the login, and the page it ended at."""
        self.provider.user = user
        browser = requests.Session()
        return browser, browser.get(self.url + "/hub/home", timeout=60)

    def auth_state(self, user):
        return self.api("GET", f"/users/{user}").json()["auth_state"]

    def exchanges(self):
        return len(self.broker.requests(TOKEN_PATH))

    def reset(self):
        self.broker.answers = {**self.usual, TOKEN_PATH: exchange}
        self.broker.calls.clear()


@pytest.fixture(scope="module", params=[True, False], ids=["basic", "body"])
def a_world(request, tmp_path_factory):
    world = World(tmp_path_factory.mktemp("hub"), request.param)
    world.reset()
    world.start()
    yield world
    world.stop()
    if world.broker.server:
        world.broker.stop()
    world.provider.server.shutdown()
    for secret in ("tbh_handle", "access-token-of", "the-code-of", "the-providers-secret"):
        # The address of the callback holds the code; the hub logs it itself.
        lines = [line for line in world.log().splitlines() if secret in line and "/oauth_callback?" not in line]
        assert lines == []


@pytest.fixture
def world(a_world, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    a_world.reset()
    return a_world


def test_a_login_leaves_the_hub_a_handle(world):
    _, page = world.login("alice")
    assert page.status_code == 200 and "alice" in page.text
    assert world.broker.requests("/v1/claim") == [
        {"provider": "keycloak", "handle": "tbh_handle-of-alice", "user": "alice"}
    ]
    (form,) = (dict(urllib.parse.parse_qsl(body)) for body in world.broker.requests(TOKEN_PATH))
    assert form.pop("code_verifier") and form.pop("redirect_uri") and form.pop("data") == "None"
    assert form == {"grant_type": "authorization_code", "code": "the-code-of-alice"}
    assert world.auth_state("alice")["refresh_token"] == "tbh_handle-of-alice"


def test_a_login_that_the_hub_refuses_is_not_claimed(world):
    _, page = world.login("mallory")
    assert page.status_code == 403
    assert world.exchanges() == 1 and world.broker.requests("/v1/claim") == []


def test_a_login_with_the_broker_down_says_so(world):
    world.broker.stop()
    try:
        _, page = world.login("alice")
        assert page.status_code == 403
        assert relay.DOWN in page.text
    finally:
        os.unlink(world.broker.path)
        world.broker.start()


def test_a_claim_that_is_refused_is_a_page_with_its_sentence(world):
    world.broker.refuse("/v1/claim", 403, "denied", "bob is linked to another person", "ask the help desk")
    _, page = world.login("bob")
    assert page.status_code == 403 and "Bob is linked to another person. Ask the help desk." in page.text


def test_a_session_is_checked_and_takes_the_new_token(world):
    browser, _ = world.login("carol")
    world.broker.answers["/v1/check-session"] = {"active": True, "token": token("carol", 2)}
    assert browser.get(world.url + "/hub/home").status_code == 200
    assert world.auth_state("carol")["access_token"] == "access-token-of-carol.2"
    assert world.exchanges() == 1


def test_a_session_that_has_ended_goes_to_the_login(world):
    browser, _ = world.login("carol")
    world.broker.answers["/v1/check-session"] = {"active": False, "reason": "signed out"}
    page = browser.get(world.url + "/hub/home", allow_redirects=False)
    assert page.status_code == 302 and "/hub/login" in page.headers["Location"]


@pytest.mark.parametrize("broker", ["up", "down", "refuses"])
def test_a_logout_is_told_to_the_broker_and_never_fails(world, broker):
    browser, _ = world.login("carol")
    if broker == "down":
        world.broker.stop()
    elif broker == "refuses":
        world.broker.refuse("/v1/logout", 500, "internal")
    try:
        page = browser.get(world.url + "/hub/logout", allow_redirects=False)
        assert page.status_code in (200, 302) and "/hub/error" not in page.headers.get("Location", "")
        assert browser.get(world.url + "/hub/home", allow_redirects=False).status_code == 302  # to the login
    finally:
        if broker == "down":
            os.unlink(world.broker.path)
            world.broker.start()
    assert world.broker.requests("/v1/logout") == ([] if broker == "down" else [{"user": "carol"}])


@pytest.mark.parametrize("how", ["down", "unavailable"])
def test_pages_stay_up_and_nobody_is_logged_out_without_the_broker(world, how):
    browser, _ = world.login("carol")
    userinfo = world.provider.userinfo
    if how == "down":
        world.broker.stop()
    else:
        world.broker.refuse("/v1/check-session", 503, "unavailable")
    try:
        for _ in range(3):
            assert browser.get(world.url + "/hub/home", allow_redirects=False).status_code == 200
    finally:
        if how == "down":
            os.unlink(world.broker.path)
            world.broker.start()
    assert (world.exchanges(), world.provider.userinfo) == (1, userinfo)


def test_a_frozen_broker_does_not_hold_the_hub(world):
    world.login("carol")
    browser, _ = world.login("dave")
    world.broker.answers["/v1/check-session"] = FROZEN
    answers = []
    stuck = threading.Thread(target=lambda: answers.append(browser.get(world.url + "/hub/home").status_code))
    count = len(world.broker.requests("/v1/check-session"))
    stuck.start()
    world.broker.wait_for("/v1/check-session", count + 1)
    assert requests.get(world.url + "/hub/health").ok and answers == []
    stuck.join()
    assert answers == [200]  # after the hook's five seconds
    world.broker.thaw.set()
    world.broker.thaw = threading.Event()


def spawn(world, user):
    answer = world.api("POST", f"/users/{user}/server")
    if answer.status_code == 202:
        world.api("GET", f"/users/{user}/server/progress")  # ends when it is ready
    return answer


def test_a_server_is_registered_and_unregistered(world):
    world.login("erin")
    assert spawn(world, "erin").status_code in (201, 202)
    (request,) = world.broker.requests("/v1/register")
    assert request == {
        "user": "erin",
        "server": "",
        "groups": [],
        "shared": False,
        "require_grant": False,
        "uid": os.geteuid(),
        "provider": "keycloak",
        "handle": "tbh_handle-of-erin",
    }
    env = requests.get(f"http://127.0.0.1:{world.settings['server_port']}/user/erin/env").json()
    directory = world.usual["/v1/register"]["directory"]
    assert env["TOKENBROKER_SOCKET"] == directory + "/broker.sock" and env["SITE"] == "was here"
    assert "tbh_" not in json.dumps(env) and "access-token-of" not in json.dumps(env)
    assert world.api("DELETE", "/users/erin/server").status_code in (202, 204)
    world.broker.wait_for("/v1/unregister")
    assert world.broker.requests("/v1/unregister") == [{"user": "erin", "server": "", "generation": 7}]


def test_groups_and_shares_of_a_running_server_are_said(world):
    browser, _ = world.login("erin")
    world.login("frank")
    assert spawn(world, "erin").status_code in (201, 202)
    world.api("POST", "/groups/lab")
    world.api("POST", "/groups/lab/users", json={"users": ["erin"]})
    assert world.api("POST", "/shares/erin/", json={"user": "frank"}).ok
    world.broker.calls.clear()
    browser.get(world.url + "/hub/home")
    assert world.broker.requests("/v1/set-groups")[-1] == {"user": "erin", "groups": ["lab"]}
    assert world.broker.requests("/v1/set-shared")[-1] == {"user": "erin", "server": "", "shared": True}

    assert world.api("PATCH", "/shares/erin/", json={"user": "frank"}).ok  # ends it
    browser.get(world.url + "/hub/home")
    assert world.broker.requests("/v1/set-shared")[-1] == {"user": "erin", "server": "", "shared": False}

    assert world.api("POST", "/shares/erin/", json={"user": "frank"}).ok
    assert world.api("DELETE", "/users/erin/server").status_code in (202, 204)
    world.broker.wait_for("/v1/unregister")
    assert spawn(world, "erin").status_code in (201, 202)
    request = world.broker.requests("/v1/register")[-1]
    assert request["groups"] == ["lab"] and request["shared"] is True
    world.api("DELETE", "/groups/lab")
    world.api("DELETE", "/shares/erin/")
    assert world.api("DELETE", "/users/erin/server").status_code in (202, 204)
    world.broker.wait_for("/v1/unregister", 2)


def test_a_refused_spawn_says_why_over_the_api_and_leaves_nothing(world):
    world.login("frank")
    world.broker.refuse("/v1/register", 403, "revoked", "your access was cut off", "ask the help desk")
    answer = spawn(world, "frank")
    assert answer.status_code == 403
    assert answer.json()["message"] == "Your access was cut off. Ask the help desk. (ref 99)"
    assert world.broker.requests("/v1/unregister") == [{"user": "frank", "server": "", "generation": 0}]
    assert world.api("GET", "/users/frank").json()["servers"] == {}


def test_a_spawn_with_the_broker_down_is_a_page_with_a_sentence(world):
    browser, _ = world.login("frank")
    world.broker.stop()
    try:
        page = browser.get(world.url + "/hub/spawn", timeout=60)
        assert page.status_code == 503 and hooks.DOWN in page.text
        answer = spawn(world, "frank")
        assert answer.status_code == 503 and answer.json()["message"] == hooks.DOWN
    finally:
        os.unlink(world.broker.path)
        world.broker.start()


def test_a_user_who_never_logged_in_is_started_by_an_admin(world):
    world.api("POST", "/users/dora")
    assert spawn(world, "dora").status_code in (201, 202)
    assert "handle" not in world.broker.requests("/v1/register")[0]
    assert world.api("DELETE", "/users/dora/server").status_code in (202, 204)
    world.broker.wait_for("/v1/unregister")


def test_sessions_live_through_a_restart_of_the_hub(world):
    browser, _ = world.login("alice")
    world.stop()
    world.start()
    assert browser.get(world.url + "/hub/home", allow_redirects=False).status_code == 200
    assert world.exchanges() == 1
    _, page = world.login("bob")  # through the new relay, with its new secret
    assert page.status_code == 200


def test_jupyterhub_token_needs_neither_key_nor_broker(world):
    world.login("alice")
    done = subprocess.run(
        world.jupyterhub("token", "alice"),
        cwd=world.directory,
        env=world.env(key=None),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    api_token = done.stdout.decode().split()[-1]
    me = requests.get(world.url + "/hub/api/user", headers={"Authorization": "token " + api_token}).json()
    assert me["name"] == "alice"


def test_a_hub_without_a_key_ends_with_a_sentence(world):
    done = subprocess.run(
        world.jupyterhub(), cwd=world.directory, env=world.env(key=None), capture_output=True, timeout=120
    )
    assert done.returncode == 1
    assert b"tokenbroker_hub: JUPYTERHUB_CRYPT_KEY is not set" in done.stderr
    assert b"Traceback" not in done.stderr
