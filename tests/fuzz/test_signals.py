"""A few of the signals; and that the campaign finds what it is for."""

import random
import signal
import time

import pytest

from tests.fuzz import signals
from tests.helpers.programs import python

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")


@pytest.mark.slow
def test_commands_end_in_order():
    done = python("-m", "tests.fuzz.signals", "--count", 9, "--seed", random.randrange(10**6), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 signals" in done.stdout


class Job:
    """Sleeps, with a file that it leaves."""

    name = None
    deaf = False

    def prepare(self, place, _):
        def act():
            if self.deaf:
                for number in signals.SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
            if self.name:
                (place / self.name).touch()
            time.sleep(30)

        return (act,)

    def complaint(self, place, _):
        return "litter" if any(place.iterdir()) else None


@pytest.mark.parametrize(
    ("attributes", "outcome"),
    [({}, "ended by"), ({"name": "part.tmp"}, "litter"), ({"deaf": True}, "not ended within")],
)
def test_what_is_left_and_what_goes_on_is_found(tmp_path, monkeypatch, attributes, outcome):
    monkeypatch.setattr(signals, "LIMIT_S", 2)
    monkeypatch.setattr(signals.random.Random, "uniform", lambda *_: 1.0)
    job = Job()
    vars(job).update(attributes)
    told, _ = signals.tried(job, tmp_path, random.Random(0), 1.0)
    assert outcome in told
    assert told.startswith("FOUND") == bool(attributes)
