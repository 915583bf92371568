"""What changed while nobody could tell the broker, or it could not listen: the state is right within one recheck."""

import time

import pytest

from notebook import BY_EVENTS, MARGIN

RECHECK = 60  # seconds: broker.RecheckWithin
CODE = "token/authorization_code"


def denied(carol, what, since, within):
    """The notebook is refused so soon after since, when all could be known."""
    code, first, last = carol.until("== 'denied'", since, within)
    print(f"{what} → denied after {first:.1f} s, the last token after {last:.1f} s; promised {within} s")
    assert code == "denied", code


@pytest.mark.parametrize("kept", [True, False], ids=["the events are there still", "the events are gone"])
def test_a_role_taken_away_while_the_broker_is_down(stack, carol, keycloak, kept):
    carol.has_tokens()
    stack.stop("broker")
    try:
        carol.has_role(False)
        if not kept:  # as a realm does that keeps them for less than the outage
            keycloak.admin("DELETE", "/admin-events")
    finally:
        since = time.time()
        stack.start("broker")
    denied(carol, "role removed while the broker was down", since, BY_EVENTS if kept else RECHECK)
    carol.served("role given back", lambda: carol.has_role(True))


@pytest.mark.long
def test_a_broker_that_is_down_for_two_minutes(stack, hub, carol, keycloak, faults):
    """Roles of two users change meanwhile, there and back, and Keycloak forgets its events."""
    carol.has_tokens()
    codes = faults.count(CODE)
    stack.stop("broker")
    try:
        carol.has_role(False)
        time.sleep(60)
        carol.has_role(True)
        time.sleep(60)
        carol.has_role(False)
        keycloak.admin("DELETE", "/admin-events")
        keycloak.admin("DELETE", "/events")
    finally:
        since = time.time()
        stack.start("broker")
    denied(carol, "broker down for two minutes, no events left", since, RECHECK)
    carol.served("role given back", lambda: carol.has_role(True))
    assert faults.count(CODE) == codes, "no login was needed"


@pytest.mark.long
def test_keycloak_restarts_right_after_the_change(stack, carol, keycloak, faults):
    carol.has_tokens()
    codes = faults.count(CODE)
    for kind in ("admin-events", "events"):
        faults.add(kind=kind, status=503)
    carol.has_role(False)
    keycloak.admin("DELETE", "/admin-events")
    stack.restart("keycloak")
    faults.clear()
    denied(carol, "role removed, Keycloak restarted, no events left", time.time(), RECHECK)
    # It reads the events again, and the sessions are as they were.
    time.sleep(2 * BY_EVENTS)
    carol.served("role given back", lambda: carol.has_role(True), BY_EVENTS + MARGIN)
    assert faults.count(CODE) == codes, "no login was needed"


@pytest.mark.long
def test_keycloak_restarts_and_changes_are_seen_by_its_events_again(stack, carol, faults):
    codes = faults.count(CODE)
    carol.has_tokens()
    stack.stop("keycloak")
    assert carol.told_within(20) == {"token"}, "what is valid is served"
    stack.start("keycloak")
    time.sleep(30 + BY_EVENTS)  # rolewatch waits longer after a failure
    assert carol.refused("role removed after Keycloak's restart", lambda: carol.has_role(False)) == "denied"
    carol.served("role given back", lambda: carol.has_role(True))
    assert faults.count(CODE) == codes, "no login was needed"
