"""Runs a branch on noise, whole and in slices, and compares: whether each slice comes out as it does in the whole."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.errors import ReplayError
from revwire.find.branch_code import step_code
from revwire.libraries.noise import Noise
from revwire.libraries.rates import Undropped, stop_dropping
from revwire.planning.copies import copied
from revwire.planning.state import State
from revwire.run.attention import SlicedAttention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from revwire.find.residual import Residual


DIFFERS = "its slices do not come out as they do in the whole: samples mix, or their number is built in"


DIFFERS_TRAINING = f"in training {DIFFERS}"


_NO_ATTENTION = "it writes out no softmax attention that could run in slices"


_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError, TypeError)


"""What a branch raises that insists on the size it was written for."""


_LARGE = 2**21


_POSITIONS = 16


_ATTENTION_SLICES = 3


_SAMPLES = 3


"""As many are tried at most: one alone, and the rest."""


_TOLERANCE = 3e-5


"""Relative to the largest value, in float32: kernels of another size add up in another order."""


class Trial:
    """A branch on noise, in eval mode or in train mode with nothing dropped.

    Args:
        residual: What it is the branch of.
        trained: The same residual as training runs it, where it was recorded.
    """

    def __init__(self, residual: Residual, trained: Residual | None = None) -> None:
        self._codes = step_code(residual), step_code(trained or residual)
        self._module = _with_weights(copied(residual.frame.module)).float().eval()
        stop_dropping(self._module)
        # a layer scale of zero would agree with anything
        make_branches_count(self._module)
        self._device = next((p.device for p in self._module.parameters()), torch.device("cpu"))
        self._sides = [n.meta["value"] for n in residual.sides]
        self.shape = tuple(residual.skip.meta["value"].shape)

    def ways(self, dim: int) -> list[tuple[bool, ...]]:
        """Which side inputs may be cut with the trunk: none of them, or all that have as many samples."""
        length = self.shape[dim]
        whole = tuple(False for _ in self._sides)
        along = tuple(
            isinstance(s, Tensor) and s.ndim > 0 and len(s) == length > 1 and dim == 0 for s in self._sides
        )
        return list(dict.fromkeys((whole, along)))

    def differs(self, dim: int, cut: tuple[bool, ...]) -> str | None:
        """Why slices along a dimension, of these side inputs too, are not what the whole is; None if they are."""
        if not self._agrees(dim, cut):
            return DIFFERS
        with self._training():
            return None if self._agrees(dim, cut) else DIFFERS_TRAINING

    def changes(self, dim: int, cut: tuple[bool, ...]) -> str | None:
        """What a run of the branch leaves on modules, which each slice would leave again; None if nothing."""
        length = max(min(self.shape[0], _SAMPLES), 2)
        for shape in (*self._small(length), (length, *self.shape[1:])):
            with self._training():
                if (found := self._left_behind(shape, dim, cut)) is not None:
                    return found or None
        return None

    def _left_behind(self, shape: tuple[int, ...], dim: int, cut: tuple[bool, ...]) -> str | None:
        """The same for one shape of the trunk: "" for nothing; None where the branch does not run on that."""
        x, sides = self._inputs(shape)
        sides = [s[: len(x)] if c else s for s, c in zip(sides, cut, strict=True)]
        try:
            with torch.no_grad():
                self._run(x, sides)  # tables that stay are made once
                before = State(self._module)
                self._run(x, sides)
                again = State(self._module)
                for span in ((0, 1), (1, x.shape[dim] - 1)):
                    own = [s.narrow(0, *span) if c else s for s, c in zip(sides, cut, strict=True)]
                    self._run(x.narrow(dim, *span), own)
        except _REFUSALS:
            return None
        names = before.changed(again) or again.changed(State(self._module), caches=True)
        if not names:
            return ""
        return f"each run changes what its modules hold ({', '.join(names[:3])}), and each slice would do it again"

    @contextmanager
    def _training(self) -> Iterator[None]:
        self._module.train()
        try:
            yield
        finally:
            self._module.eval()

    def _agrees(self, dim: int, cut: tuple[bool, ...]) -> bool:
        if dim and self.shape[dim] == 1:
            return False
        samples = min(self.shape[0], _SAMPLES)
        if dim == 0:
            samples = max(samples, 2)  # one sample says nothing of how several are treated
        # windows of a long video take minutes at their own size: a few positions refute them in seconds
        for small in self._small(samples):
            found = self._agrees_at(small, dim, cut)
            if found is False:
                return False
            if found and dim == 0:
                return True  # whether samples mix is no matter of how many positions they have
            if found:
                break
        return bool(self._agrees_at((samples, *self.shape[1:]), dim, cut))

    def _small(self, samples: int) -> Iterator[tuple[int, ...]]:
        """Shapes with fewer positions; one of the dimensions holds channels, whose number is fixed."""
        if math.prod(self.shape[1:]) < _LARGE:
            return
        for channels in (len(self.shape) - 1, 1):
            rest = (n if i == channels else min(n, _POSITIONS) for i, n in enumerate(self.shape))
            yield (samples, *list(rest)[1:])

    def _agrees_at(self, shape: tuple[int, ...], dim: int, cut: tuple[bool, ...]) -> bool | None:
        """The same for one shape of the trunk; None where the branch does not run on that."""
        x, sides = self._inputs(shape)
        sides = [s[: len(x)] if c else s for s, c in zip(sides, cut, strict=True)]
        try:
            with torch.no_grad():
                wanted = self._run(x, sides)
                if wanted.shape != x.shape:
                    return False
        except _REFUSALS:
            return None
        try:
            with torch.no_grad():
                # uneven on purpose: windows that happen to fit into halves would pass for independent
                return all(
                    self._alike(wanted.narrow(dim, *span), x.narrow(dim, *span), sides, cut, span)
                    for span in ((0, 1), (1, x.shape[dim] - 1))
                )
        except _REFUSALS:
            return False

    def _alike(
        self, wanted: Tensor, x: Tensor, sides: list[Any], cut: tuple[bool, ...], span: tuple[int, int]
    ) -> bool:
        own = [s.narrow(0, *span) if c else s for s, c in zip(sides, cut, strict=True)]
        found = self._run(x, own)
        if found.shape != wanted.shape:
            return False
        return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())

    def refuses_attention(self) -> str | None:
        """Why attention cannot run in slices, None if that comes out as in the whole, in both modes."""
        if (found := self._refuses_attention()) is not None:
            return found
        with self._training():
            return f"in training {found}" if (found := self._refuses_attention()) is not None else None

    def _refuses_attention(self) -> str | None:
        # one sample with one head would have no slices
        for shape in (*self._small(2), (2, *self.shape[1:]), self.shape):
            if (found := self._sliced_at(shape)) is not None:
                return found or None
        return DIFFERS

    def _sliced_at(self, shape: tuple[int, ...]) -> str | None:
        """The reason, for one shape of the trunk: "" if there is none, None where the branch does not run on that."""
        x, sides = self._inputs(shape)
        mode = SlicedAttention(_ATTENTION_SLICES, "its attention", always=True)
        try:
            wanted = self._gradients(x, sides)
        except _REFUSALS:
            return None
        try:
            found = self._gradients(x, sides, mode)
        except (ReplayError, *_REFUSALS) as error:
            return f"its attention cannot run in slices: {error}"
        if not mode.run or mode.reused:
            return "its attention weights are used twice" if mode.run else _NO_ATTENTION
        out, *others = ((a - b).abs().max() for a, b in zip(wanted, found, strict=True))
        largest = max(g.abs().max() for g in wanted[1:])
        agree = out <= _TOLERANCE * wanted[0].abs().max() and all(d <= _TOLERANCE * largest for d in others)
        return "" if agree else "its attention comes out differently in slices"

    def _gradients(
        self, x: Tensor, sides: list[Any], within: AbstractContextManager[Any] | None = None
    ) -> list[Tensor]:
        """The output of a run within a context, and the gradients of trunk, side inputs and parameters."""
        inputs = [
            t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t
            for t in (x, *sides)
        ]
        with torch.enable_grad():
            out = self._run(inputs[0], inputs[1:], within)
            leaves = [
                t for t in (*inputs, *self._module.parameters()) if isinstance(t, Tensor) and t.requires_grad
            ]
            cotangent = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape)
            found = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    def _inputs(self, shape: tuple[int, ...]) -> tuple[Tensor, list[Any]]:
        noise = Noise()
        x = noise.normal(shape, torch.float32).to(self._device)
        return x, [_noise(side, noise, self._device) for side in self._sides]

    def _run(self, x: Tensor, sides: list[Any], within: AbstractContextManager[Any] | None = None) -> Tensor:
        code = self._codes[self._module.training]
        # the same draws for all that is drawn, whatever the rates: what still comes out otherwise cannot be compared
        # sliced attention comes first, as where steps run: what it makes is no tensor to the other modes
        with torch.random.fork_rng(), _made_in_float32(), Undropped(), within or nullcontext():
            torch.manual_seed(0)
            if code.post is None:
                # the slices of a sum come out alike where those of what is added do, and what is added tells it better
                out: Tensor = code.branch(self._module, x, *sides)[0]
                return out
            return code.block(self._module, x, *sides)[0]


@contextmanager
def _made_in_float32() -> Iterator[None]:
    """What code makes in the block without naming a dtype is float32, as the module is that is tried."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def _with_weights(module: nn.Module) -> nn.Module:
    """A module on the meta device with noise for weights on the CPU; any other as it is."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return module
    module.to_empty(device="cpu")
    noise = Noise()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * noise.normal(parameter.shape))
        for buffer in module.buffers():
            buffer.zero_()
    return module


def _noise(value: Any, noise: Noise, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return noise.normal(value.shape, torch.float32).to(device)
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool, device=device)
    return torch.zeros(value.shape, dtype=value.dtype, device=device)


def make_branches_count(model: nn.Module) -> None:
    """Noise for parameters next to zero (BatchNorm gamma, layer scale): a branch of zero agrees with anything."""
    noise = Noise()
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.detach().abs().max() < 1e-3:
            parameter.data.copy_(0.2 * noise.normal(parameter.shape))
