"""What a library's own loading makes of the tensors in a file: used, under other names, left aside, filled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from revwire.printing import first_few
from revwire.pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LISTED = 6  # how many names of each kind are printed; `to_dict` has them all


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file go into a model, where they do not all go as they are.

    Attributes:
        renamed: By name in the model, what it is made from: a name in the file, with a change of shape where there is
            one, or several.
        carried: By name in the file, the shapes of those that the model has no place for.
        filled: By name in the model, the shapes of those that the file does not have: they start as the library starts
            a new model, from random numbers.
        faults: What keeps the tensors from being a checkpoint of the model, in words; empty where nothing does.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)
    filled: Mapping[str, str] = field(default_factory=dict)
    faults: str = ""

    @property
    def plain(self) -> bool:
        """Whether every tensor has its place by its own name, and every place a tensor."""
        return not (self.renamed or self.carried or self.filled)

    def to_dict(self) -> dict[str, Any]:
        """The fit as JSON-ready dicts."""
        return {"renamed": dict(self.renamed), "carried": dict(self.carried), "filled": dict(self.filled)}

    def in_words(self, library: str) -> Iterator[str]:
        """One line for each kind of exception, with the first few names."""
        if self.carried:
            names = [f"{name} ({shape})" for name, shape in self.carried.items()]
            yield f"carried along, with no place in the model: {first_few(names, _LISTED)}"
        if self.filled:
            names = [f"{name} ({shape})" for name, shape in self.filled.items()]
            start = f"NOT in the file, each load starts them anew as {library} does, at random"
            yield f"{start}: {first_few(names, _LISTED)}"
        if self.renamed:
            names = [f"{new} is {old}" for new, old in self.renamed.items()]
            yield f"under another name: {first_few(names, _LISTED)}"


class Origins(TorchFunctionMode):
    """For the length of the block, notes which named tensors each new one is made from.

    Args:
        named: The tensors; they have to be plain ones.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._kept: list[Tensor] = list(named.values())  # so that no id is given twice
        self._of: dict[int, frozenset[str]] = {
            id(tensor): frozenset((name,)) for name, tensor in named.items()
        }

    def of(self, tensor: Tensor) -> frozenset[str]:
        """The names of the tensors that one was made from."""
        return self._of.get(id(tensor), frozenset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        names = frozenset[str]().union(*(self.of(tensor) for tensor in given))
        if names:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._kept.append(leaf)
                    self._of[id(leaf)] = self.of(leaf) | names
        return out
