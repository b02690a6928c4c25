"""A check of what code reads, written down as code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from revwire.trace.code import Bypass
from revwire.trace.same import same

_MISSING = "(KeyError, AttributeError, IndexError, TypeError, ValueError, LookupError)"


class Script:
    """A function of a module in the making: each line either takes a value or demands something of it.

    Attributes:
        namespace: What the function's globals are.
        lines: Its lines so far.
        seen: What was looked at: the name that the function knows it by, by id.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self.namespace: dict[str, Any] = {"same": same, "kind_of": kind_of, "Tensor": Tensor}
        self.lines: list[str] = []
        self.seen: dict[int, str] = {}
        self._variables = 0

    def source(self) -> str:
        """The function, as Python code; what is not there any more is no longer what it was."""
        body = "\n".join(f"  {line}" for line in self.lines)
        return f"def check(self):\n try:\n{body}\n  return True\n except {_MISSING}:\n  return False\n"

    def constant(self, value: Any) -> str:
        """How the function names a value of now."""
        if value is None or value is True or value is False:
            return repr(value)
        name = f"c{id(value):x}"
        self.namespace[name] = value
        return name

    def variable(self, at: str) -> str:
        """A variable of the function for what an expression finds."""
        if at.isidentifier():
            return at
        self._variables += 1
        self.lines.append(f"v{self._variables} = {at}")
        return f"v{self._variables}"

    def demand(self, condition: str) -> None:
        """What must hold."""
        self.lines.append(f"if not ({condition}): return False")

    def demand_member(self, member: Any, at: str) -> None:
        """A class's function must be this one; while this is traced another may be in its place."""
        if isinstance(member, Bypass):
            member = member.cached
        if isinstance(member, staticmethod | classmethod) and isinstance(member.__func__, Bypass):
            self.demand(f"{at}.__func__ is {self.constant(member.__func__.cached)}")
        else:
            self.demand(f"{at} is {self.constant(member)}")

    def forget(self, lines: int, seen: int) -> None:
        """Take out what was written since there were so many lines, and so much seen."""
        del self.lines[lines:]
        while len(self.seen) > seen:
            self.seen.popitem()


def kind_of(module: nn.Module) -> type:
    """A module's class as its author made it."""
    cls = type(module)
    original: type = cls.__dict__.get("revwire_original", cls)
    return original
