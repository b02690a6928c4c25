"""What rewired blocks hand each other in a tensor's place: it answers for shapes without merging any streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revwire.run.tensor_like import TensorLike

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# what either stream answers as the merged tensor would, without making it
_ALIKE = (
    {"dim", "numel", "nelement", "element_size", "stride", "get_device", "layout"}
    | {"is_contiguous", "is_floating_point", "is_complex", "is_sparse", "is_nested", "is_quantized"}
    | {"is_cuda", "is_cpu", "is_mps"}
)


class Travelling(TensorLike):
    """Both streams of a trunk, or a piece of both.

    Attributes:
        current: The later stream, for its shape and strides.
        dtype: That of the tensor which this would be.
    """

    current: Tensor
    dtype: torch.dtype

    def sample(self) -> Tensor:
        """A tensor of its shape and dtype, without gradient, for which no streams are merged."""
        return self.current.detach().to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of either stream."""
        return self.current.shape

    @property
    def device(self) -> torch.device:
        """Device of either stream."""
        return self.current.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.current.ndim

    def size(self, dim: int | None = None) -> Any:
        """As `torch.Tensor.size`."""
        return self.current.size() if dim is None else self.current.size(dim)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.current, name) if name in _ALIKE else super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.current)


def is_travelling(value: object) -> bool:
    """Whether a value is what travels between rewired blocks in a tensor's place."""
    return isinstance(value, Travelling)


def as_tensor(value: Any) -> Any:
    """`value`, or the merged tensor where it travels in its place."""
    return value.tensor() if isinstance(value, Travelling) else value
