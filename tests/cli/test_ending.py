"""Signals that end a command: it unwinds, and none is lost."""

import signal
import sys

import pytest

from tests.helpers.programs import python

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")

# the signal comes while a finalizer runs, which drops what a handler raises
IN_A_FINALIZER = """
import gc, os, signal, sys, time
from revwire.cli.ending import ended_in_order

class Slow:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        time.sleep(0.01)

try:
    with ended_in_order():
        slow = Slow()
        slow.itself = slow
        del slow
        gc.collect()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)
        print("lost")
finally:
    print("unwound", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, sys.unraisablehook is sys.__unraisablehook__)
"""

IGNORED = """
import os, signal, time
from revwire.cli.ending import ended_in_order
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with ended_in_order():
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.1)
print("went on")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_in_a_finalizer_is_not_lost(name):
    done = python("-c", IN_A_FINALIZER, name, timeout=60)
    assert done.stdout == "unwound True True\n", done.stderr
    wanted = {"SIGTERM": 128 + signal.SIGTERM, "SIGHUP": 128 + signal.SIGHUP, "SIGINT": -signal.SIGINT}
    assert done.returncode == wanted[name]


def test_what_is_ignored_stays_ignored():
    done = python("-c", IGNORED, timeout=60)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_other_errors_of_finalizers_are_told_as_ever(capsys):
    from revwire.cli.ending import ended_in_order

    told = []
    before, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        with ended_in_order():

            class Bad:
                def __del__(self):
                    raise ValueError("of its own")

            Bad()
    finally:
        sys.unraisablehook = before
    assert [str(each.exc_value) for each in told] == ["of its own"]


def test_in_another_thread_nothing_is_set():
    from concurrent.futures import ThreadPoolExecutor

    from revwire.cli.ending import ended_in_order

    def within():
        with ended_in_order():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(within).result() is signal.getsignal(signal.SIGTERM)
