"""A site that ran without the broker: its users' sessions move over, and nobody notices."""

import base64
import hashlib
import json
import secrets
import sqlite3
from contextlib import closing
from urllib.parse import urlencode

import pytest
import requests

from conftest import PLANTED
from leaks import auth_states, fernet
from people import Browser
from refstack.process import wait_for
from refstack.stack import BROKER


def log_in_past_the_broker(stack, hub, user):
    """What the hub's OAuthenticator did before: a code flow with the provider's own secret."""
    verifier = secrets.token_urlsafe(40)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    callback = f"{hub.url}/hub/oauth_callback"
    endpoint = f"{stack.issuer}/protocol/openid-connect"
    code = Browser().code(f"{endpoint}/auth?" + urlencode({
        "client_id": "jupyterhub", "redirect_uri": callback, "response_type": "code", "scope": "openid",
        "code_challenge": challenge, "code_challenge_method": "S256", "state": "s"}), user, callback)
    response = requests.post(f"{endpoint}/token", timeout=30, data={
        "grant_type": "authorization_code", "code": code, "redirect_uri": callback, "code_verifier": verifier,
        "client_id": "jupyterhub", "client_secret": stack.secret("broker-client-secret")})
    assert response.status_code == 200, response.text
    return response.json()


def write_auth_state(stack, user, state):
    """Put a user's auth_state into the database of a hub that is down."""
    sealed = fernet(stack, BROKER).encrypt(json.dumps(state).encode())
    with closing(sqlite3.connect(stack.dir / f"hub-{BROKER}/jupyterhub.sqlite")) as db, db:
        changed = db.execute("update users set encrypted_auth_state = ? where name = ?", (sealed, user)).rowcount
    assert changed == 1


def test_an_old_auth_state_is_adopted_and_nobody_is_logged_out(stack, hub, faults):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    api_token = hub.token_of("carol")
    old = log_in_past_the_broker(stack, hub, "carol")
    PLANTED.add(old["refresh_token"])
    stack.stop("hub-broker")
    state = auth_states(stack, BROKER)["carol"]
    write_auth_state(stack, "carol", {
        **state, "access_token": old["access_token"], "refresh_token": old["refresh_token"], "token_response": old})
    stack.start("hub-broker")
    codes = faults.count("token/authorization_code")

    page = browser.open(hub.url + "/hub/home")
    assert page.url == hub.url + "/hub/home"
    new = auth_states(stack, BROKER)["carol"]
    assert new["refresh_token"].startswith("tbh_"), "the refresh token has left the database"
    assert new["token_response"]["refresh_token"] == new["refresh_token"]
    assert old["refresh_token"] not in json.dumps(new)
    assert hub.api("GET", "/user", api_token).status_code == 200
    carol = hub.spawn("carol", token=api_token)
    try:
        assert carol.ask("/v1/token/keycloak?audience=storage").status == 200
    finally:
        hub.stop_server("carol")
    assert faults.count("token/authorization_code") == codes, "nobody had to log in again"


@pytest.mark.parametrize("trouble", ["provider", "broker"])
def test_adoption_waits_for_better_times(stack, hub, faults, trouble):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    old = log_in_past_the_broker(stack, hub, "carol")
    PLANTED.add(old["refresh_token"])
    stack.stop("hub-broker")
    state = auth_states(stack, BROKER)["carol"]
    write_auth_state(stack, "carol", {
        **state, "access_token": old["access_token"], "refresh_token": old["refresh_token"], "token_response": old})
    if trouble == "broker":
        stack.stop("broker")
    else:
        faults.add(kind="token/refresh_token", status=503)
    codes = faults.count("token/authorization_code")
    try:
        stack.start("hub-broker")
        assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
    finally:
        faults.clear()
        if trouble == "broker":
            stack.start("broker")
    adopted(stack, browser, hub)
    assert faults.count("token/authorization_code") == codes


def adopted(stack, browser, hub):
    """Opens pages until the hub has a handle."""
    def has_handle():
        assert browser.open(hub.url + "/hub/home").url == hub.url + "/hub/home"
        return auth_states(stack, BROKER)["carol"]["refresh_token"].startswith("tbh_")

    wait_for("adoption", has_handle, 30)
