"""After all that was done to it."""

import re


def test_the_broker_never_panicked_and_the_race_detector_said_nothing(stack):
    log = (stack.dir / "log/broker.log").read_text()
    assert log
    assert not re.findall(r"^(panic:|fatal error:|WARNING: DATA RACE).*$", log, re.M)


def test_everything_still_runs(stack):
    assert [name for name, running, _ in stack.status() if not running] == []
