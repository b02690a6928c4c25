"""Stretches of code that no signal cuts in two, so that what they make is undone whenever one comes."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class HeldSignals:
    """Signals that wait; one that came is sent again when they are let through.

    Signals that end the process at once, as there is no handler in Python for them, still do.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[int] = []

    def hold(self) -> None:
        """Have them wait from here on; in another thread than the main one there is nothing to wait."""
        if threading.current_thread() is threading.main_thread():
            now = {number: signal.getsignal(number) for number in _ENDING if number not in self._handlers}
            self._handlers |= {number: handler for number, handler in now.items() if callable(handler)}
            _install(dict.fromkeys(self._handlers, self._note))

    def let_through(self) -> None:
        """Handle them as ever, those that have come too."""
        handlers, self._handlers = self._handlers, {}
        _install(handlers)
        while self._came:
            signal.raise_signal(self._came.pop())

    def _note(self, number: int, _: FrameType | None) -> None:
        if number not in self._came:
            self._came.append(number)


def _install(handlers: Mapping[int, Any]) -> None:
    """Set all handlers, and only then let through what those of before have raised meanwhile."""
    raised: BaseException | None = None
    for number, handler in handlers.items():
        while signal.getsignal(number) != handler:
            try:
                signal.signal(number, handler)
            except BaseException as error:  # noqa: BLE001 - of a signal that came just before
                raised = error
    if raised is not None:
        raise raised


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """For the length of the block, signals that end a program wait, but where it lets them through in between.

    That has to be a `try` with `hold()` in its `finally`, and the `try` that undoes what was made around it: a context
    manager of its own, left by a signal before its block begins, would end when its traceback goes.
    """
    held = HeldSignals()
    try:
        held.hold()
        yield held
    finally:
        held.let_through()
