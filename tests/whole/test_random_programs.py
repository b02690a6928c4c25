"""Random programs on random nets: gradients are those with everything kept, or an error was raised."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from revwire.run.branch import BranchRun
from revwire.run.conditions import Conditions
from tests.whole.machine.programs import TRIED, Programs

pytestmark = pytest.mark.slow


def run(programs, **options):
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=programs,
            stateful_step_count=16,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_gradients_are_those_with_everything_kept_whatever_the_program():
    before = TRIED.copy()
    run(150)
    done = TRIED - before
    # a machine that compares nothing finds nothing
    assert done["gradients compared"] > done["programs"]
    assert done["nets that cannot be rewired"] < done["programs"] / 2


def test_the_machine_finds_a_second_run_that_is_another(monkeypatch):
    monkeypatch.setattr(Conditions, "run", lambda self, where, function: function())
    monkeypatch.setattr(BranchRun, "_sample", lambda *_: None)
    with pytest.raises(AssertionError, match=r"gradient|random states|apart"):
        run(150, database=None, derandomize=True, phases=[Phase.generate])
