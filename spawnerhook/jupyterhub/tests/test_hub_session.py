"""Login and refresh: Claim and CheckSession, on a real OAuthenticator."""

import asyncio
import hashlib
import json

import pytest
from hub_fakes import User, docker_spawner
from hub_standin import FROZEN, Raw
from oauthenticator.generic import GenericOAuthenticator
from tokenbroker_hub import hooks
from tokenbroker_hub.broker import Broker
from tornado import web
from traitlets.config import Config

STATE = {
    "access_token": "old-token",
    "refresh_token": "tbh_1",
    "id_token": "old-id",
    "token_response": {
        "access_token": "old-token",
        "refresh_token": "tbh_1",
        "token_type": "Bearer",
        "id_token": "old-id",
    },
    "scope": ["openid"],
    "oauth_user": {"name": "alice", "groups": ["old"]},
}
TOKEN = {
    "access_token": "new-token",
    "token_type": "Bearer",
    "expires_in": 60,
    "scope": "openid",
    "id_token": "new-id",
    "refresh_token": "tbh_2",
}


class Authenticator(GenericOAuthenticator):
    userinfo = {"name": "alice", "groups": ["new"]}

    async def token_to_user(self, token_info):
        if isinstance(self.userinfo, Exception):
            raise self.userinfo
        assert token_info["token_type"] == "Bearer"
        return self.userinfo


def authenticator(**settings):
    c = Config()
    c.GenericOAuthenticator.username_claim = "name"
    c.GenericOAuthenticator.enable_auth_state = True
    c.GenericOAuthenticator.update({"allow_all": True, **settings})
    return Authenticator(config=c)


def login(broker, model, site=None, timeout=5.0):
    hook = hooks.login_hook(Broker(broker.path, timeout), "keycloak")
    return asyncio.run(hook(site, authenticator(), None, model))


def refresh(broker, state=STATE, site=None, auth=None, user=None, timeout=5.0, unchecked=900):
    hook = hooks.refresh_hook(Broker(broker.path, timeout), "keycloak", unchecked)
    user = user or User("alice", state)
    return asyncio.run(hook(site, auth or authenticator(), user, state))


# --- Claim ---


def test_a_login_is_claimed(broker):
    model = {"name": "alice", "auth_state": STATE}
    assert login(broker, model) is model
    assert broker.requests("/v1/claim") == [{"provider": "keycloak", "handle": "tbh_1", "user": "alice"}]


def test_the_handle_is_taken_before_the_sites_hook_and_the_name_after(broker):
    async def site(authenticator, handler, model):
        return {"name": "renamed", "auth_state": {"only": "this"}}

    assert login(broker, {"name": "alice", "auth_state": STATE}, site) == {
        "name": "renamed",
        "auth_state": {"only": "this"},
    }
    assert broker.requests("/v1/claim") == [{"provider": "keycloak", "handle": "tbh_1", "user": "renamed"}]


def test_a_login_that_the_site_refuses_is_not_claimed(broker):
    assert login(broker, {"name": "alice", "auth_state": STATE}, lambda *a: None) is None

    def refuse(*args):
        raise web.HTTPError(403, "not today")

    with pytest.raises(web.HTTPError, match="not today"):
        login(broker, {"name": "alice", "auth_state": STATE}, refuse)
    assert broker.calls == []


@pytest.mark.parametrize("state", [None, {}, {"refresh_token": None}])
def test_a_login_without_a_handle_claims_nothing(broker, state):
    model = {"name": "alice", "auth_state": state}
    assert login(broker, model) is model
    assert broker.calls == []


@pytest.mark.parametrize(
    "answer",
    [
        FROZEN,
        Raw(b""),
        Raw(b"HTTP/1.0 200 OK\r\n\r\n{oops"),
        (503, {"code": "unavailable"}),
        (429, {"code": "limited"}),
    ],
)
def test_a_claim_that_gets_lost_lets_the_login_go_on(broker, answer):
    broker.answers["/v1/claim"] = answer
    model = {"name": "alice", "auth_state": STATE}
    assert login(broker, model, timeout=0.3) is model


def test_a_claim_that_is_refused_ends_the_login_with_its_sentence(broker):
    broker.refuse("/v1/claim", 403, "denied", "alice is linked to another person", "ask it-help@lab.example")
    with pytest.raises(web.HTTPError) as e:
        login(broker, {"name": "alice", "auth_state": STATE})
    assert e.value.status_code == 403
    assert e.value.jupyterhub_message == "Alice is linked to another person. Ask it-help@lab.example. (ref 99)"


# --- CheckSession ---


def test_a_session_that_lives_changes_nothing(broker):
    assert refresh(broker) is True
    have = hashlib.sha256(b"old-token").hexdigest()
    assert broker.requests("/v1/check-session") == [
        {"provider": "keycloak", "handle": "tbh_1", "user": "alice", "have_sha256": have}
    ]


def test_a_session_that_has_ended_needs_a_login(broker):
    broker.answers["/v1/check-session"] = {"active": False, "stale": False, "token": None, "reason": "signed out"}
    assert refresh(broker) is False


def test_a_stale_answer_keeps_the_session(broker):
    broker.answers["/v1/check-session"] = {"active": True, "stale": True, "token": None, "reason": "provider down"}
    assert refresh(broker) is True


def test_a_new_token_makes_a_new_auth_model(broker):
    broker.answers["/v1/check-session"] = {"active": True, "stale": False, "token": TOKEN}
    model = refresh(broker, auth=authenticator(manage_groups=True, auth_state_groups_key="oauth_user.groups"))
    assert model["name"] == "alice" and model["groups"] == ["new"]
    state = model["auth_state"]
    assert (state["access_token"], state["refresh_token"]) == ("new-token", "tbh_2")
    assert state["token_response"] == TOKEN


def test_the_sites_own_code_makes_the_model_with_it(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth = authenticator(modify_auth_state_hook=lambda authenticator, state: {**state, "site": "was here"})
    assert refresh(broker, auth=auth)["auth_state"]["site"] == "was here"


def test_a_user_renamed_at_login_stays_who_he_is(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    assert refresh(broker, user=User("alice-renamed", STATE))["name"] == "alice-renamed"


# --- who is not allowed any more ---

GROUPS = {"allow_all": False, "manage_groups": True, "auth_state_groups_key": "oauth_user.groups"}


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"allow_all": False, "allowed_users": {"alice"}}, True),
        ({"allow_all": False, "allowed_users": {"bob"}}, False),
        ({"allow_all": False, "allowed_users": {"bob"}, "admin_users": {"alice"}}, True),
        ({"blocked_users": {"alice"}}, False),
        ({**GROUPS, "allowed_groups": {"new"}}, True),
        ({**GROUPS, "allowed_groups": {"old"}}, False),
    ],
)
def test_who_could_not_log_in_any_more_has_no_session(broker, settings, allowed):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    user = User("alice", STATE)
    answer = refresh(broker, auth=authenticator(**settings), user=user)
    assert (answer and answer["name"]) == ("alice" if allowed else False)
    assert broker.requests("/v1/logout") == ([] if allowed else [{"user": "alice", "not_allowed": True}])
    if not allowed:  # also an adopted token must leave the database
        assert user.auth_state["refresh_token"] == "tbh_2"


def test_allowed_is_the_name_that_logged_in_and_not_what_the_site_made_of_it(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth = authenticator(allow_all=False, allowed_users={"alice"})
    assert refresh(broker, auth=auth, user=User("alice-renamed", STATE))["name"] == "alice-renamed"


@pytest.mark.parametrize(
    ("error", "allowed"), [(web.HTTPError(403, "not you"), False), (web.HTTPError(500), True), (ConnectionError(), True)]
)
def test_trouble_in_finding_out_who_is_allowed_logs_nobody_out(broker, error, allowed):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth = authenticator()

    async def check_allowed(username, model):
        raise error

    auth.check_allowed = check_allowed
    assert bool(refresh(broker, auth=auth)) is allowed


@pytest.mark.parametrize("answer", [(503, {"code": "unavailable"}), (400, {"code": "invalid"})])
def test_a_session_that_is_not_allowed_ends_whatever_the_broker_says(broker, answer):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    broker.answers["/v1/logout"] = answer
    assert refresh(broker, auth=authenticator(blocked_users={"alice"})) is False


@pytest.mark.parametrize(
    "error", [web.HTTPError(500, "id token: new-id"), ConnectionError(), ValueError(), KeyError("x")]
)
def test_with_userinfo_down_nobody_is_logged_out_and_the_token_is_kept(broker, caplog, error):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth, user = authenticator(), User("alice", STATE)
    auth.userinfo = error
    assert refresh(broker, auth=auth, user=user) is True
    assert user.auth_state["refresh_token"] == user.auth_state["token_response"]["refresh_token"] == "tbh_2"
    assert user.auth_state["access_token"] == user.auth_state["token_response"]["access_token"] == "new-token"
    assert user.auth_state["oauth_user"] == STATE["oauth_user"]
    assert "new-id" not in caplog.text


def test_an_adopted_token_leaves_auth_state_at_once_even_with_userinfo_down(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth = authenticator()
    auth.userinfo = ConnectionError()
    state = json.loads(json.dumps(STATE).replace("tbh_1", "a-real-refresh-token"))
    user = User("alice", state)
    assert refresh(broker, state, auth=auth, user=user) is True
    assert "a-real-refresh-token" not in json.dumps(user.auth_state)


def test_even_auth_state_that_can_not_be_saved_logs_nobody_out(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    auth, user = authenticator(), User("alice", STATE)
    auth.userinfo = ConnectionError()

    async def broken(state):
        raise RuntimeError

    user.save_auth_state = broken
    assert refresh(broker, auth=auth, user=user) is True


@pytest.mark.parametrize("token", [{}, [], "x", {**TOKEN, "access_token": ""}, {**TOKEN, "refresh_token": 7}])
def test_a_malformed_token_is_no_token(broker, token):
    broker.answers["/v1/check-session"] = {"active": True, "token": token}
    assert refresh(broker) is True


@pytest.mark.parametrize("state", [None, {}, {"access_token": "x"}])
def test_a_session_without_a_handle_is_left_to_oauthenticator(broker, state):
    assert refresh(broker, state) is None
    assert broker.calls == []


TROUBLE = [
    FROZEN,
    Raw(b""),
    Raw(b"HTTP/1.0 200 OK\r\n\r\n{oops"),
    (503, {"code": "unavailable"}),
    (500, {"code": "internal"}),
]


@pytest.mark.parametrize("answer", TROUBLE)
def test_trouble_with_the_broker_logs_nobody_out(broker, answer):
    broker.answers["/v1/check-session"] = answer
    assert refresh(broker, timeout=0.3) is True


def test_a_broker_that_is_down_too_long_needs_a_login(broker, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)
    hook = hooks.refresh_hook(Broker(broker.path, 5), "keycloak", 900)

    def ask(name="alice"):
        return asyncio.run(hook(None, authenticator(), User(name, STATE), STATE))

    broker.refuse("/v1/check-session", 503, "unavailable")
    assert ask() is True
    now += 899
    assert ask() is True
    now += 1
    assert ask() is False and ask("bob") is False
    broker.answers["/v1/check-session"] = {"active": True}
    assert ask() is True
    now += 10_000  # nobody asked in between; the next trouble starts its own clock
    broker.refuse("/v1/check-session", 503, "unavailable")
    assert ask() is True


@pytest.mark.parametrize(
    ("code", "want"), [("login_required", False), ("revoked", False), ("invalid", True), ("limited", True)]
)
def test_of_refusals_only_the_end_of_the_session_ends_it(broker, code, want):
    broker.refuse("/v1/check-session", 400, code)
    assert refresh(broker) is want


# --- the site's own refresh_user_hook ---


async def site_true(*args):
    return True


def site_none(*args):
    return None


def site_false(*args):
    return False


def site_model(authenticator, user, auth_state):
    return {"name": user.name, "groups": ["site"], "auth_state": {**auth_state, "site": "was here"}}


@pytest.mark.parametrize(("site", "want"), [(site_true, True), (site_none, True), (site_false, False)])
def test_the_sites_hook_is_asked_first(broker, site, want):
    assert refresh(broker, site=site) is want
    assert len(broker.requests("/v1/check-session")) == (0 if want is False else 1)


def test_an_ended_session_ends_whatever_the_sites_hook_says(broker):
    broker.answers["/v1/check-session"] = {"active": False}
    assert refresh(broker, site=site_true) is False
    assert refresh(broker, site=site_model) is False


def test_the_sites_model_stays_and_takes_the_new_token(broker):
    assert refresh(broker, site=site_model)["groups"] == ["site"]
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    model = refresh(broker, site=site_model)
    assert model["groups"] == ["site"] and model["auth_state"]["site"] == "was here"
    assert model["auth_state"]["refresh_token"] == "tbh_2"


def test_the_sites_model_stays_with_the_broker_down(broker):
    broker.stop()
    assert refresh(broker, site=site_model)["groups"] == ["site"]


def test_a_cancelled_check_is_cancelled(broker):
    broker.answers["/v1/check-session"] = FROZEN
    hook = hooks.refresh_hook(Broker(broker.path, 60), "keycloak", 900)

    async def cancelled():
        task = asyncio.create_task(hook(None, authenticator(), User("alice", STATE), STATE))
        await asyncio.to_thread(broker.wait_for, "/v1/check-session")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_no_secret_is_logged(broker, caplog):
    caplog.set_level("DEBUG")
    auth = authenticator()
    auth.userinfo = web.HTTPError(500, "new-token")
    for answer in ({"active": True, "token": TOKEN}, {"active": False}, *TROUBLE):
        broker.answers["/v1/check-session"] = broker.answers["/v1/claim"] = answer
        refresh(broker, auth=auth, timeout=0.2)
        login(broker, {"name": "alice", "auth_state": STATE}, timeout=0.2)
    for secret in ("old-token", "new-token", "tbh_", "old-id", "new-id"):
        assert secret not in caplog.text


# --- SetGroups and SetShared ---

MANAGED = {"manage_groups": True, "auth_state_groups_key": "oauth_user.groups"}


def test_a_refresh_says_the_groups_that_the_hub_has(broker):
    assert refresh(broker, user=User("alice", STATE, groups=["zebras", "ants"])) is True
    assert broker.requests("/v1/set-groups") == [{"user": "alice", "groups": ["ants", "zebras"]}]


def test_a_refresh_that_brings_groups_says_these(broker):
    broker.answers["/v1/check-session"] = {"active": True, "token": TOKEN}
    refresh(broker, auth=authenticator(**MANAGED), user=User("alice", STATE, groups=["old"]))
    assert broker.requests("/v1/set-groups") == [{"user": "alice", "groups": ["new"]}]


def test_the_last_group_is_lost(broker):
    def site(authenticator, user, auth_state):
        return {"name": user.name, "groups": [], "auth_state": auth_state}

    refresh(broker, site=site, auth=authenticator(**MANAGED), user=User("alice", STATE, groups=["old"]))
    assert broker.requests("/v1/set-groups") == [{"user": "alice", "groups": []}]


def test_groups_that_the_hub_does_not_take_from_the_login_are_not_said(broker):
    refresh(broker, site=site_model, user=User("alice", STATE, groups=["of the hub"]))
    assert broker.requests("/v1/set-groups") == [{"user": "alice", "groups": ["of the hub"]}]


def test_a_login_says_the_groups_that_come_with_it(broker):
    hook = hooks.login_hook(Broker(broker.path), "keycloak")
    model = {"name": "alice", "auth_state": STATE, "groups": ["b", "a"]}
    for auth in (authenticator(**MANAGED), authenticator()):
        asyncio.run(hook(None, auth, None, model))
    assert broker.requests("/v1/set-groups") == [{"user": "alice", "groups": ["a", "b"]}]


def test_a_session_that_has_ended_says_nothing(broker):
    broker.answers["/v1/check-session"] = {"active": False}
    assert refresh(broker) is False
    assert [path for path, _ in broker.calls] == ["/v1/check-session"]


def test_a_broker_that_is_down_is_not_asked_twice(broker):
    broker.answers["/v1/check-session"] = (503, {"code": "unavailable"})
    assert refresh(broker) is True
    assert [path for path, _ in broker.calls] == ["/v1/check-session"]


def test_a_refresh_says_which_running_servers_are_shared(broker):
    user = User("alice", STATE)
    user.spawners = {name: docker_spawner(user, server=name) for name in ("", "gpu", "stopped")}
    for name in ("", "gpu"):
        user.spawners[name]._spawn_pending = True  # so that it is active
    user.spawners["gpu"].orm_spawner.share_codes.append(type("Code", (), {"expired": False}))
    refresh(broker, user=user)
    assert broker.requests("/v1/set-shared") == [
        {"user": "alice", "server": "", "shared": False},
        {"user": "alice", "server": "gpu", "shared": True},
    ]


@pytest.mark.parametrize("answer", [FROZEN, Raw(b""), (404, {"code": "invalid"}), (503, {"code": "unavailable"})])
def test_what_can_not_be_said_ends_no_session(broker, answer):
    broker.answers["/v1/set-groups"] = answer
    assert refresh(broker, timeout=0.3) is True
    assert broker.requests("/v1/set-shared") == []


def test_a_database_in_trouble_ends_no_session(broker):
    user = User("alice", STATE)
    user.spawners = {"": docker_spawner(user)}
    user.spawners[""]._spawn_pending = True
    user.spawners[""].db = None
    assert refresh(broker, user=user) is True
