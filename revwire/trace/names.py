"""The names that the code of a frame mentions, functions that it calls included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revwire.trace.code import is_foreign, mentioned
from revwire.trace.script import Script

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType, FunctionType

_HOPS = 2  # code that touches a tensor is seen to run; beyond it, so many calls away are followed


class Names(Script):
    """Follows code, and collects what it mentions.

    Attributes:
        names: Names and words, each with how many calls away from code that ran it is mentioned.
        words: The words among them.
        asked: Names that it asks for, as they may not be there.
        computed: Whether it reads attributes whose names it does not mention.
        functions: The functions followed, by id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}
        self.words: set[str] = set()
        self.asked: set[str] = set()
        self.computed = False
        self.functions: dict[int, FunctionType] = {}
        self.hops: dict[int, int] = {}
        self.hop = 0

    def mentions(self, names: Iterable[str]) -> bool:
        """Whether the code mentions one of these names."""
        return not self.names.keys().isdisjoint(names)

    def follow(self, function: FunctionType, *, whole: bool = False) -> None:
        """Take a function for code that may run; `whole`: torch's own too, if it is a module's."""
        if self.hop > _HOPS or id(function) in self.functions:
            return
        if whole or not is_foreign(function.__module__):
            self.functions[id(function)] = function
            self.hops[id(function)] = self.hop
            self.mention(function.__code__)

    def mention(self, code: CodeType) -> None:
        """Take what a piece of code mentions."""
        found = mentioned(code)
        for name in found.names | found.words:
            self.names[name] = min(self.hop, self.names.get(name, self.hop))
        self.words |= found.words
        self.computed |= found.computes_names
        self.asked |= found.asked

    def named(self, held: Iterable[str]) -> Iterator[str]:
        """Those of the names mentioned that something holds; functions found there are one call further away."""
        for name in sorted(self.names.keys() & held):
            self.hop = self.names[name] + 1
            yield name
