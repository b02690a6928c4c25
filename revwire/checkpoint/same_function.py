"""Whether two models of the same tensors compute the same: the operations they run, compared one by one.

Both run on the meta device, so it takes neither weights nor memory. Equal operations prove that the models compute the
same; different ones prove nothing, as such models may still do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire import libraries
from revwire._torch import TorchDispatchMode
from revwire.pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SAME_TENSOR = ("aten::detach", "aten::alias", "aten::lift_fresh")


def same_operations(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models, in eval mode, run the same operations on the same tensors in the same order.

    Args:
        one: On the meta device; the input is the one it was built for.
        other: On the meta device, with the same names in its state dict.
    """
    inputs = libraries.example_inputs(one, batch=1)
    if not isinstance(inputs, Tensor):
        return False
    try:
        return _operations(one, inputs) == _operations(other, inputs)
    except Exception:  # noqa: BLE001 - whatever a model may raise on an input that is not its own
        return False


def _operations(model: nn.Module, inputs: Tensor) -> list[Any]:
    training = model.training
    recorder = _Recorder({**model.state_dict(keep_vars=True), "": inputs})
    try:
        with torch.no_grad(), recorder:
            output = model.eval()(inputs)
        return [*recorder.operations, recorder.named(output)]
    finally:
        model.train(training)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Notes operations, with tensors as names: their own, or the number of the operation that made them."""

    def __init__(self, names: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Any] = []
        self._kept = list(names.values())  # so that no id is given twice
        self._names: dict[int, Any] = {id(tensor): name for name, tensor in names.items()}

    def named(self, tree: Any) -> Any:
        """A structure as something to compare."""
        return repr(tree_map(lambda leaf: self._name(leaf) if isinstance(leaf, Tensor) else leaf, tree))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = self.named((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func._schema.name  # noqa: SLF001 - the operation without its overload has no public name
        if name in _SAME_TENSOR:
            self._keep(out, lambda _: self._name(args[0]))
            return out
        number = len(self.operations)
        self.operations.append((name.removesuffix("_"), given))  # in place or not, it computes the same
        self._keep(out, lambda place: (number, place))
        return out

    def _keep(self, out: Any, name: Callable[[int], Any]) -> None:
        for place, tensor in enumerate(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self._kept.append(tensor)
            self._names[id(tensor)] = name(place)

    def _name(self, tensor: Tensor) -> Any:
        return self._names.get(id(tensor), tuple(tensor.shape))
