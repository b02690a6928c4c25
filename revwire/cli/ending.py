"""A command that a signal ends: what is half written is removed, and no signal is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# a scheduler's, a closed terminal's; Ctrl-C is Python's own KeyboardInterrupt
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_S, _LOST_S = 0.02, 0.2
# called by torch's dispatcher, which is C++
_OF_DISPATCHER = tuple(f"torch{os.sep}{package}{os.sep}" for package in ("_library", "_subclasses"))
_LATEST_S = 2.0
"""After which a signal ends what it finds."""


class _Ended(SystemExit):
    """Of a signal; unlike its base it can be watched."""


class _Interrupted(KeyboardInterrupt):
    """Of Ctrl-C."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """For the length of the block, signals that end a program unwind it first, as Ctrl-C does.

    Python drops an exception that a signal raises while a finalizer runs (in the garbage collector, in `__del__`), code
    in C forgets one that comes in Python code which it calls, and other code may catch all there are; the program goes
    on. A signal whose exception is gone before the block has ended is sent once more a moment later, and so is one that
    comes in a function which torch's C++ calls, where an exception may end the process at once. Code that makes an
    error of its own of the exception is of no avail: the block ends by the signal. One that is ignored (`nohup`) stays
    ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    signals = _Signals()
    before = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGINT)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", before)
        sys.unraisablehook = lambda unraisable: _is_ours(unraisable.exc_value) or before(unraisable)
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
            signal.signal(number, signals.end)
        stack.callback(signals.over.set)
        try:
            yield
        except (Exception, _Ended, _Interrupted) as error:
            if not signals.raised:
                raise
            raise signals.ending() from error


class _Signals:
    """Those that came in a block.

    Attributes:
        raised: Their numbers.
        over: Set when the block has ended.
    """

    def __init__(self) -> None:
        self.raised: list[int] = []
        self.over = threading.Event()
        self._watched: list[weakref.ref[BaseException]] = []
        self._first: float | None = None

    def end(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self._first = now = self._first or time.monotonic()
        if time.monotonic() - now < _LATEST_S and _called_by_torch(frame):
            self._send_again(number, _AGAIN_S)
            return
        self.raised.append(number)
        raise self._exception(number)  # in no variable here: its traceback would keep it alive

    def ending(self) -> BaseException:
        """What the block ends by; Python looks for this very class, to end by the signal."""
        number = self.raised[0]
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    def _exception(self, number: int) -> BaseException:
        error = _Interrupted() if number == signal.SIGINT else _Ended(128 + number)
        self._watched.append(weakref.ref(error, lambda _: self._send_again(number, _LOST_S)))
        return error

    def _send_again(self, number: int, seconds: float) -> None:
        def send() -> None:
            if not self.over.is_set():
                _send(number)

        if not self.over.is_set():
            again = threading.Timer(seconds, send)
            again.daemon = True
            again.start()


def _is_ours(error: BaseException | None) -> bool:
    return isinstance(error, _Ended | _Interrupted)


def _called_by_torch(frame: FrameType | None) -> bool:
    """Whether code that is running was called out of torch's dispatcher, parts of which let no exception through."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__torch_dispatch__" or any(part in code.co_filename for part in _OF_DISPATCHER):
            return True
        frame = frame.f_back
    return False


def _send(number: int) -> None:
    """A signal for the main thread."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
