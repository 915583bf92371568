"""Roles that change while a token is valid and nobody says so."""

CODE = "token/authorization_code"
WITHIN = 60  # broker.RecheckWithin


def test_a_role_taken_away_while_the_token_is_valid_is_refused_within_the_recheck(carol, faults):
    """Nobody refreshes meanwhile but the recheck itself, and Keycloak's events are away."""
    for kind in ("admin-events", "events"):
        faults.add(kind=kind, status=503)
    codes = faults.count(CODE)
    try:
        assert carol.refused("role removed, nothing but the recheck", lambda: carol.has_role(False), WITHIN) == "denied"
    finally:
        carol.served("role given back, nothing but the recheck", lambda: carol.has_role(True), WITHIN)
    assert faults.count(CODE) == codes, "no login was needed"
