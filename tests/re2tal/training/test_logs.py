"""What the log of a run tells of the machine, and that it is told whole."""

import signal

import pytest

from examples.re2tal.training import logs
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


def test_a_signal_waits_until_all_is_told(tmp_path):
    """TensorBoard's queue, left in the middle of a put, has its close() wait for ever."""

    class Came(BaseException):
        pass

    def came(*_):
        raise Came

    before = signal.signal(signal.SIGTERM, came)
    told = []
    try:
        log = logs.Log(tmp_path, enabled=True, step=0, total=2, quiet=True)

        class Board:
            def add_scalar(self, name, value, step):
                signal.raise_signal(signal.SIGTERM)
                told.append(name)

            def close(self):
                signal.raise_signal(signal.SIGTERM)
                told.append("closed")

        log._board = Board()
        with pytest.raises(Came):
            log.step(1, loss=1.0, rate=0.1)
        assert told == ["loss", "rate"]
        with pytest.raises(Came):
            log.__exit__(None, None, None)
        assert told == ["loss", "rate", "closed"]
    finally:
        signal.signal(signal.SIGTERM, before)
