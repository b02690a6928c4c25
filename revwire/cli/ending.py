"""A command that a signal ends: what is half written is removed, and no signal is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

# a scheduler's, a closed terminal's; Ctrl-C is Python's own KeyboardInterrupt
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_AGAIN_S = 0.02


@contextmanager
def ended_in_order() -> Iterator[None]:
    """For the length of the block, signals that end a program unwind it first, as Ctrl-C does.

    Python drops an exception that a signal raises while a finalizer runs (in the garbage collector, in `__del__`), and
    goes on. Such a signal is sent once more a moment later. One that is ignored (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    raised: dict[int, tuple[BaseException, int]] = {}

    def end(number: int, _: FrameType | None) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        raised[id(error)] = error, number
        raise error

    def dropped(unraisable: Any) -> None:
        if id(unraisable.exc_value) not in raised:
            before(unraisable)
            return
        again = threading.Timer(_AGAIN_S, _send, raised[id(unraisable.exc_value)][1:])
        again.daemon = True
        again.start()

    before = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGINT)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", before)
        sys.unraisablehook = dropped
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
            signal.signal(number, end)
        yield


def _send(number: int) -> None:
    """A signal for the main thread."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)
