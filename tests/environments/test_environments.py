"""The wheel, used where this checkout is not."""

import re

import pytest
from packaging.requirements import Requirement

from tests.environments.__main__ import lowest
from tests.helpers.programs import python


@pytest.mark.slow
def test_every_command_runs_from_the_wheel():
    done = python("-m", "tests.environments", "here", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all commands ran" in re.sub(r"\s+", " ", done.stdout)


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [("torch>=2.9", "==2.9.*"), ("timm>=1.0.20", "==1.0.20"), ("transformers>=5", "==5.0.*")],
)
def test_the_lowest_of_a_requirement(declared, wanted):
    assert str(lowest(Requirement(declared)).specifier) == wanted
