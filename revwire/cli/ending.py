"""A command that a signal ends: what is half written is removed, and no signal is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# a scheduler's, a closed terminal's; Ctrl-C is Python's own KeyboardInterrupt
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_S = 0.02
# called by torch's dispatcher, which is C++
_OF_DISPATCHER = tuple(f"torch{os.sep}{package}{os.sep}" for package in ("_library", "_subclasses"))
_LATEST_S = 2.0
"""After which a signal ends what it finds."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """For the length of the block, signals that end a program unwind it first, as Ctrl-C does.

    Python drops an exception that a signal raises while a finalizer runs (in the garbage collector, in `__del__`), and
    goes on. Such a signal is sent once more a moment later, and so is one that comes in a function which torch's C++
    calls, where an exception may end the process at once. Other code in C makes an error of its own of the exception:
    the block ends by the signal all the same. One that is ignored (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    raised: dict[int, tuple[BaseException, int]] = {}
    first: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] < _LATEST_S and _called_by_torch(frame):
            _send_again(number)
            return
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        raised[id(error)] = error, number
        raise error

    def dropped(unraisable: Any) -> None:
        if id(unraisable.exc_value) not in raised:
            before(unraisable)
            return
        _send_again(raised[id(unraisable.exc_value)][1])

    before = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGINT)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", before)
        sys.unraisablehook = dropped
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
            signal.signal(number, end)
        try:
            yield
        except Exception as error:
            if raised:
                raise next(iter(raised.values()))[0] from error
            raise


def _called_by_torch(frame: FrameType | None) -> bool:
    """Whether code that is running was called out of torch's dispatcher, parts of which let no exception through."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__torch_dispatch__" or any(part in code.co_filename for part in _OF_DISPATCHER):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    again = threading.Timer(_AGAIN_S, _send, (number,))
    again.daemon = True
    again.start()


def _send(number: int) -> None:
    """A signal for the main thread."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
