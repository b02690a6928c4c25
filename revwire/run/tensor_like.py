"""An object that behaves like the tensor that it could become, and becomes one only when its values are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from revwire.pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class TensorLike:
    """Behaves as the tensor that it would be (`tensor()`) in torch functions, methods, operators and attributes.

    It is no `torch.Tensor`: `isinstance` says so, and code that insists on one calls `tensor()`. What a function does
    with it, `_call` decides.
    """

    def tensor(self) -> Tensor:
        """The tensor that it looks like."""
        raise NotImplementedError

    def _call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)`, where this object is among the arguments."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}), is_leaf=lambda leaf: isinstance(leaf, cls))
        first: Any = next(leaf for leaf in leaves if isinstance(leaf, cls))
        return first._call(function, args, kwargs or {})  # noqa: SLF001 - of this class

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(Tensor, name, None)
        if attribute is not None and callable(attribute):
            return lambda *args, **kwargs: self._call(attribute, (self, *args), kwargs)
        return getattr(self.tensor(), name)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: TensorLike, *args: Any) -> Any:
        return self._call(function, (self, *args), {})

    return method


_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv mod pow rpow matmul rmatmul
    neg pos abs invert and or xor eq ne lt le gt ge getitem setitem iter bool float int index contains
"""
for _name in _OPERATORS.split():
    setattr(TensorLike, f"__{_name}__", _operator(f"__{_name}__"))
TensorLike.__hash__ = object.__hash__  # type: ignore[method-assign]
