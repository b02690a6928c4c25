"""Signals that end a command: it unwinds, and none is lost."""

import signal
import sys

import pytest

from tests.helpers.programs import python

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")

# as a terminal starts a program: what runs the tests, a background job of a shell, may ignore some
FRESH = """
import signal
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

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

# the exception becomes one of the code that it came in, or comes where torch would let none through
ELSEWHERE = """
import os, signal, sys, time
from revwire.cli.ending import ended_in_order

def masked():
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        time.sleep(20)
    except BaseException:
        raise ValueError("of its own")

class Mode:
    deaf = 0.3

    def __torch_dispatch__(self):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        end = time.monotonic() + self.deaf
        while time.monotonic() < end:
            time.sleep(0.01)
        print("not inside")

class DeafMode(Mode):
    deaf = 20

def dispatched():
    Mode().__torch_dispatch__()
    time.sleep(20)
    print("lost")

inside = {}

def looked_up(mode):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(0.3)
    print("not inside")

def library():
    place = os.sep.join(["packages", "torch", "_library", "rules.py"])
    exec(compile("def rule(act): act(None)", place, "exec"), inside)
    inside["rule"](looked_up)
    time.sleep(20)
    print("lost")

def stuck():
    DeafMode().__torch_dispatch__()

def caught():
    for attempt in range(3):
        try:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            time.sleep(20)
        except BaseException:
            print("caught")
            time.sleep(0.01)
    time.sleep(20)
    print("lost")

try:
    with ended_in_order():
        globals()[sys.argv[2]]()
except ValueError as error:
    print("masked", error)
finally:
    print("unwound")
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
    done = python("-c", FRESH + IN_A_FINALIZER, name, timeout=60)
    assert done.stdout == "unwound True True\n", done.stderr
    wanted = {"SIGTERM": 128 + signal.SIGTERM, "SIGHUP": 128 + signal.SIGHUP, "SIGINT": -signal.SIGINT}
    assert done.returncode == wanted[name]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("masked", "unwound\n"),
        ("dispatched", "not inside\nunwound\n"),
        ("library", "not inside\nunwound\n"),
        ("stuck", "unwound\n"),
        ("caught", "caught\ncaught\ncaught\nunwound\n"),
    ],
)
def test_a_signal_ends_the_command_wherever_it_comes(name, place, told):
    done = python("-c", FRESH + ELSEWHERE, name, place, timeout=60)
    assert done.stdout == told, done.stderr
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
