"""Users who log out at Keycloak, which tells the broker so (OpenID Connect Back-Channel Logout), and at the hub."""

import pytest

from notebook import MARGIN
from people import Browser
from refstack.process import wait_for

SECOND_LOOK = 5  # seconds after Keycloak's word: it tells of one session where it has ended several


def test_a_logout_at_keycloak_ends_the_tokens_of_that_session(stack, hub, carol, audit):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    assert carol.refused("logout at Keycloak", lambda: browser.log_out(stack.issuer), within=1) == "login_required"

    # The same kernel goes on after a login, also while another browser logs out.
    first, second = Browser(), Browser()
    first.log_in(hub.url, "carol")
    second.log_in(hub.url, "carol")
    carol.has_tokens()
    heard = len(audit("provider_logout"))
    first.log_out(stack.issuer)
    wait_for("Keycloak's word of it", lambda: len(audit("provider_logout")) > heard, 1 + MARGIN)
    assert "looked at" in audit("provider_logout")[-1], audit("provider_logout")[-1]
    assert carol.told_within(SECOND_LOOK + 1) == {"token"}, "the session that the tokens are of lives on"


def test_an_administrators_logout_of_all_sessions(hub, carol, keycloak):
    """Keycloak tells of one of them only."""
    Browser().log_in(hub.url, "carol")
    assert carol.refused("an administrator's logout", lambda: keycloak.end_sessions("carol"),
                         within=SECOND_LOOK + 1) == "login_required"
    carol.log_in()


@pytest.mark.parametrize("on_logout", ["stop_issuing", "revoke"])
def test_a_logout_at_the_hub(stack, hub, carol, on_logout):
    stack.configure(on_logout=on_logout)
    try:
        browser = Browser()
        browser.log_in(hub.url, "carol")
        sessions = len(carol.admin("GET", "/sessions").json())
        assert carol.refused(f"logout at the hub, on_logout: {on_logout}",
                             lambda: browser.open(f"{hub.url}/hub/logout"), within=1) == "login_required"
        if on_logout == "revoke":
            wait_for("the end of the session at Keycloak", lambda: len(carol.admin("GET", "/sessions").json()) < sessions)
        else:
            assert len(carol.admin("GET", "/sessions").json()) == sessions
        carol.log_in()
    finally:
        stack.configure()


def test_a_logout_at_the_hub_where_a_computation_is_to_go_on(hub, carol):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    carol.has_tokens()
    browser.open(f"{hub.url}/hub/logout")
    assert carol.told_within(1) == {"token"}
