"""One step of a chain: from the generated code of a residual to the two streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.experimental.overlap import OverlappedLink, can_overlap
from revwire.find.branch_code import StepCode, owner_of
from revwire.planning.slicing import mixes_now
from revwire.rewrite.wired import PROGRAM
from revwire.run.attention import SlicedAttention
from revwire.run.branch import Branch
from revwire.run.streams import Streams
from revwire.run.tape import Link
from revwire.run.travelling import as_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from revwire.planning.plan import Step
    from revwire.run.options import Options
    from revwire.run.slices import Slices


def run_step(
    module: nn.Module,
    step: Step,
    code: StepCode,
    options: Options,
    trunk: Any,
    sides: tuple[Any, ...],
    *,
    begins: bool = False,
    ends: bool,
    cut: bool = False,
) -> Any:
    """One step of a chain: enters it where `trunk` is a tensor, goes on where it is a `Streams`.

    Args:
        module: The module whose frame holds the residual.
        step: The step as planned.
        code: Its branch.
        options: How steps run.
        trunk: What enters it.
        sides: What the branch reads beside the trunk.
        begins: Whether it begins one: the pair that another chain hands on, as training may take another way than
            the planning run, is merged then.
        ends: Whether it ends its chain and hands on a plain tensor.
        cut: Whether the code after it cuts its sum in pieces that the next step's joins again.

    Returns:
        The streams after the step, or the tensor; a tuple of it and the inner values that the branch hands out, if any.
    """
    coupling = options.coupling.in_mode(training=module.training)
    shared: list[tuple[Any, ...]] = []

    def branch(x: Tensor, *rest: Any) -> Tensor:
        out, inner = code.added(module, x, *rest, keeps_skip=coupling.keeps_function)
        if inner and not shared:
            shared.append(inner)
        return out

    if not coupling.a:
        total, inner = code.block(module, as_tensor(trunk), *sides)
        return (total, *inner) if inner else total
    modules = [_child(module, path) for path in code.modules]
    owners = [owner_of(module, path) for path in code.own]
    slices = _slices_now(step, options, modules, trunk, sides)
    function = _attention_sliced(step, options, branch, 1 if slices is None else slices.count(trunk.shape))
    link_type = OverlappedLink if options.overlap and can_overlap(trunk.device) else Link
    known = module.__dict__[PROGRAM].known(step)
    run = Branch(step.name, function, modules, owners, slices, step.mode, options.check, known)
    if not isinstance(trunk, Streams) or begins or not trunk.can_continue(coupling, options.exact):
        trunk = Streams.enter(as_tensor(trunk), coupling, options.exact)
    replay = options.replay and not torch.compiler.is_exporting()
    following = trunk.advance(run, sides, replay=replay, link_type=link_type)
    following.place.cut = cut
    following = following.tensor() if ends else following
    if not shared:
        return following
    # the branch outlives the forward, and must not keep what it handed out: an empty tuple tells it that it did
    handed = shared[0]
    shared[0] = ()
    return (following, *handed)


def _child(module: nn.Module, path: str) -> nn.Module:
    child: nn.Module | None = module
    for name in path.split("."):
        child = None if child is None else child._modules.get(name)
    return module.get_submodule(path) if child is None else child


def _slices_now(
    step: Step, options: Options, modules: list[nn.Module], trunk: Any, sides: tuple[Any, ...]
) -> Slices | None:
    """The planned slices, where this call has anything to cut and nothing mixes samples in the mode it runs in."""
    cut = step.slicing
    if cut is None or not options.sliced or trunk.shape[cut.dim] < 2 or len(sides) != len(cut.sides):
        return None
    length = trunk.shape[cut.dim]
    for is_cut, side in zip(cut.sides, sides, strict=True):
        rows = len(side) if isinstance(side, Tensor) and side.ndim else 0
        # a side input of one row, or of no dimension, serves all samples; one that has as many rows as there are
        # samples may have had another number when it was proven that it is not to be cut
        if cut.dim == 0 and is_cut is not (rows == length):
            return None
    return None if mixes_now(modules) else cut


def _attention_sliced(
    step: Step, options: Options, branch: Callable[..., Tensor], slices: int
) -> Callable[..., Tensor]:
    """The branch with its softmax attention in slices, where the trunk has fewer of them than wanted."""
    wanted = -(-step.slices // slices) if step.inside else 1
    if wanted < 2 or not options.sliced or torch.compiler.is_exporting():
        return branch

    def run(x: Tensor, *rest: Any) -> Tensor:
        with SlicedAttention(wanted, step.name):
            return branch(x, *rest)

    return run
