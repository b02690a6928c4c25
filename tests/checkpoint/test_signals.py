"""What is made is undone, at whatever moment a signal comes."""

import signal
import sys
import threading

import pytest

from revwire.checkpoint.disk import written_whole
from revwire.checkpoint.signals import held_signals


class Came(BaseException):
    """A handler's."""


@pytest.fixture
def raising():
    """SIGTERM and SIGINT raise, as in a command."""

    def handler(number, _):
        raise Came(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handler) for number in numbers]
    yield handler
    for number, old in zip(numbers, before, strict=True):
        signal.signal(number, old)


def of_this_package(frame):
    """Whether a signal may come here: in the code that holds them and writes, and whatever that calls."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(("checkpoint/disk.py", "checkpoint/signals.py")):
            return True
        frame = frame.f_back
    return False


def written(out, at):
    """Write a file while a signal comes at the `at`-th line that runs; returns whether there were so many lines."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if event == "line" and of_this_package(frame):
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        with written_whole(out) as file:
            file.write(b"new")
    finally:
        sys.settrace(None)
    return lines >= at


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a file is closed by its end of life
def test_a_signal_at_any_line_leaves_nothing_but_a_whole_file(tmp_path, raising):
    out, at, ended = tmp_path / "file", 0, 0
    while True:
        at += 1
        out.write_bytes(b"older")
        try:
            if not written(out, at):
                break
        except Came:
            ended += 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"], at
        assert out.read_bytes() in (b"older", b"new"), at
        assert signal.getsignal(signal.SIGTERM) is raising, at
        assert signal.getsignal(signal.SIGINT) is raising, at
    assert ended == at - 1 > 50


def test_what_comes_while_it_is_held_comes_when_it_is_let_through(raising):
    done = []

    def part(*comes):
        with held_signals() as held:
            signal.raise_signal(comes[0])
            done.append("held")
            try:
                held.let_through()
                signal.raise_signal(comes[1])
            finally:
                held.hold()
                signal.raise_signal(comes[2])
                done.append("held again")

    with pytest.raises(Came, match=str(int(signal.SIGTERM))):
        part(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert done == ["held", "held again"]
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is raising


def test_what_is_ignored_stays_ignored(raising):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not raising
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_set(tmp_path, raising):
    found = []

    def write():
        with held_signals(), written_whole(tmp_path / "file") as file:
            file.write(b"new")
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert found == [raising]
    assert (tmp_path / "file").read_bytes() == b"new"
