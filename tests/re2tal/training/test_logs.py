"""What the log of a run tells of the machine."""

import pytest

from tests.helpers.memory import STATUS
from tests.helpers.programs import python

PEAK = """
import torch
from examples.re2tal.training.logs import peak_gib

before = peak_gib(torch.device("cpu"))
torch.ones(100 * 2**20)
print(before, peak_gib(torch.device("cpu")))
"""


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_the_peak_is_the_process_s_own():
    """Not that of the process which started it."""
    large = bytearray(b"1") * 2**31
    done = python("-c", PEAK)
    del large
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert 0.1 < before < 1.5
    assert 0.35 < after - before < 0.45
