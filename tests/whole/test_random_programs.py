"""Random programs on random nets: gradients are those with everything kept, or an error was raised."""

import pytest
from hypothesis import Phase

from revwire.run.branch import BranchRun
from revwire.run.conditions import Conditions
from tests.whole.machine.programs import TRIED, tried

pytestmark = pytest.mark.slow

STEPS = 16


def test_gradients_are_those_with_everything_kept_whatever_the_program():
    before = TRIED.copy()
    tried(150, STEPS)
    done = TRIED - before
    # a machine that compares nothing finds nothing
    assert done["gradients compared"] > done["programs"]
    assert done["nets that cannot be rewired"] < done["programs"] / 2


def test_the_machine_finds_a_second_run_that_is_another(monkeypatch):
    monkeypatch.setattr(Conditions, "run", lambda self, where, function: function())
    monkeypatch.setattr(BranchRun, "_sample", lambda *_: None)
    with pytest.raises(AssertionError, match=r"gradient|random states|apart"):
        tried(150, STEPS, database=None, derandomize=True, phases=[Phase.generate])
