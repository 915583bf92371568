"""Roles that change while a token is valid. It comes late: tokens of its long life
would keep other tests waiting for their end."""

import time

from people import Browser, claims
from refstack.process import wait_for

CODE = "token/authorization_code"
STORAGE = "/v1/token/keycloak?audience=storage"


def test_a_role_taken_away_while_the_token_is_valid_is_refused_within_the_recheck(stack, hub, keycloak, faults):
    """The worst case is broker.RecheckWithin; nobody refreshes meanwhile but the recheck itself, and Keycloak's events are away."""
    for kind in ("admin-events", "events"):
        faults.add(kind=kind, status=503)
    within, margin = 60, 5
    realm = keycloak.admin("GET", "").json()
    role = keycloak.admin("GET", "/roles/researcher").json()
    id = keycloak.admin("GET", "/users?username=carol&exact=true").json()[0]["id"]
    mapping = f"/users/{id}/role-mappings/realm"
    # Tokens must outlive the recheck, or their end alone would show the change; the rule takes five minutes at most.
    keycloak.admin("PUT", "", json={**realm, "accessTokenLifespan": 290})
    try:
        Browser().log_in(hub.url, "carol")
        carol = hub.spawn("carol")
        # One of the old life may still be in the cache.
        wait_for("a token of the new life", lambda: claims(carol.ask(STORAGE).token)["exp"] - time.time() > 3 * within, 90)
        codes = faults.count(CODE)

        start = time.monotonic()
        keycloak.admin("DELETE", mapping, json=[role])
        denied = wait_for("the refusal", lambda: (a := carol.ask(STORAGE)).status != 200 and a, within + margin)
        lost = time.monotonic() - start
        assert (denied.status, denied.code) == (403, "denied"), denied

        start = time.monotonic()
        keycloak.admin("POST", mapping, json=[role])
        wait_for("the role's return", lambda: carol.ask(STORAGE).status == 200, within + margin)
        gained = time.monotonic() - start
        assert faults.count(CODE) == codes, "no login was needed"
        print(f"role removed → refused: {lost:.1f} s; given back → token: {gained:.1f} s")
    finally:
        keycloak.admin("PUT", "", json={**keycloak.admin("GET", "").json(), "accessTokenLifespan": realm["accessTokenLifespan"]})
        keycloak.admin("POST", mapping, json=[role])
        hub.stop_server("carol")
