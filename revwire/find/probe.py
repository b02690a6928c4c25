"""Which residual additions follow each other on one trunk when the model runs.

The model runs once on fake tensors, every frame traced as it goes. A residual follows another when its skip is the
very tensor that the other one's sum became, at most rearranged in between. Residuals that run inside the branch of a
chained one are left alone; where a lone residual holds a chain inside its branch, the inner chain counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from revwire._torch import DataDependentOutputException
from revwire.errors import RewireError
from revwire.find.residual import Residual, find_blocks, find_residuals, name_of
from revwire.planning.plan import Chain, Plan, Skipped, Step
from revwire.pytree import tree_leaves
from revwire.trace.graph import rearranges
from revwire.trace.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from revwire.trace.frame import Frame, Identity

MIN_STEPS = 2
"""A chain of one step is no gain: it would hold two streams where autograd holds one branch."""


@dataclass(frozen=True)
class Probe:
    """A recorded run.

    Attributes:
        model: The model that ran.
        frames: Every module call, in running order.
        residuals: All residual additions, in running order; a module called twice has each twice.
        notes: Sums that look like residuals and are none: (module path, reason).
        origins: Which tensor each rearranged tensor came from.
    """

    model: nn.Module
    frames: tuple[Frame, ...]
    residuals: tuple[Residual, ...]
    notes: tuple[tuple[str, str], ...]
    origins: dict[Identity, Identity]

    @cached_property
    def blocks(self) -> tuple[Residual, ...]:
        """Children of `nn.Sequential`s that can be steps of a coupling with b != 0, in running order."""
        return tuple(block for f in self.frames if f.graph is not None for block in find_blocks(f))

    @cached_property
    def cuts(self) -> dict[tuple[Any, ...], tuple[int, tuple[bool, ...]] | str]:
        """What `revwire.planning.slicing` has proven of each kind of branch so far."""
        return {}

    @cached_property
    def whole_inside(self) -> dict[tuple[Any, ...], str | None]:
        """Why the attention of each kind of branch cannot run in parts, None where it can, as far as it was asked."""
        return {}

    @cached_property
    def _additions(self) -> dict[tuple[str, int], Residual]:
        return {_key(r): r for r in self.residuals if not r.refused}

    @cached_property
    def _whole(self) -> dict[tuple[str, int], Residual]:
        return {_key(r): r for r in self.blocks if not r.refused}

    def residual(self, step: Step) -> Residual | None:
        """What a planned step runs, with what moves into its branch; None if this model has no such residual."""
        found = (self._whole if step.block else self._additions).get((step.module, step.residual))
        return None if found is None else found.with_post(step.post) or found


def sources(value: Identity, origins: dict[Identity, Identity]) -> Iterator[Identity]:
    """A value, and those that it is a rearrangement of, the nearest first."""
    at: Identity | None = value
    while at is not None:
        yield at
        at = origins.get(at)


def probe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Probe:
    """Run `model` once on fake tensors and find all residual additions.

    Runs in eval mode, so that layers dropped at random while training are seen; the model keeps its mode, parameters,
    buffers, attributes and random state, and no memory is taken for activations. Only a model whose code decides by
    the numbers in a tensor is run once for real.

    Raises:
        RewireError: the model does not run on these inputs.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        try:
            recorder = _recorded(model, args, kwargs, real=False)
        except DataDependentOutputException:
            recorder = _recorded(model, args, kwargs, real=True)
    except Exception as error:
        raise RewireError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}; "
            "pass example_inputs that its forward takes"
        ) from error
    finally:
        for module in training:
            module.training = True
    residuals: list[Residual] = []
    notes: list[tuple[str, str]] = []
    for frame in recorder.frames:
        if frame.graph is not None:
            found, reasons = find_residuals(frame)
            residuals.extend(found)
            notes.extend((frame.path, reason) for reason in reasons)
    residuals.sort(key=lambda r: r.total.meta["order"])
    residuals = _with_norms(residuals, recorder.origins)
    return Probe(model, tuple(recorder.frames), tuple(residuals), tuple(notes), recorder.origins)


def _with_norms(residuals: list[Residual], origins: dict[Identity, Identity]) -> list[Residual]:
    """The residuals of post-norm blocks with their norm moved into the branch: the next one's trunk is its output.

    The last block of a kind goes with the others: what its norm feeds is no residual's trunk.
    """
    entered = {at for residual in residuals for at in sources(residual.entering, origins)}
    moved: dict[tuple[type, int], str | None] = {}
    for residual in residuals:
        if residual.leaving not in entered:
            for count in range(len(residual.following), 0, -1):
                longer = replace(residual, post=residual.following[:count])
                if longer.leaving in entered:
                    moved[type(residual.frame.module), residual.index] = longer.post_name
                    break
    return [
        (r.with_post(moved[kind]) or r) if (kind := (type(r.frame.module), r.index)) in moved else r
        for r in residuals
    ]


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, real: bool) -> Recorder:
    recorder = Recorder(model, real=real)
    args, kwargs = recorder.example((args, kwargs))
    with recorder.recording():
        model(*args, **kwargs)
    return recorder


def make_plan(
    found: Probe,
    coupling: str,
    include: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] = (),
    *,
    blocks: bool = False,
) -> Plan:
    """Choose the chains of a recorded run.

    Args:
        found: The recorded run.
        coupling: Name of the coupling, noted in the plan.
        blocks: Whether the coupling takes blocks that are no residual additions.
        include: Globs of module paths; only modules that match one are rewired.
        exclude: Globs of module paths that are left alone.
    """
    reasons: dict[tuple[str, int], str] = {}
    eligible: list[Residual] = []
    for residual in found.residuals:
        reason = residual.refused or _excluded(residual.frame.path, include, exclude)
        if reason:
            reasons[_key(residual)] = reason
        else:
            eligible.append(residual)
    if blocks and found.blocks and (whole := _blocks(found, eligible, include, exclude)):
        eligible = sorted((*eligible, *whole), key=lambda r: r.total.meta["order"])
    chains = _chains(found, eligible, reasons)
    planned = {_key(r) for chain in chains for r in chain}
    skipped = [Skipped(path, reason) for (path, _), reason in reasons.items()]
    skipped += [Skipped(path, reason) for path, reason in found.notes]
    skipped += [
        Skipped(f.path, f"its forward {f.failure}")
        for f in found.frames
        if f.failure and _matters(f, planned)
    ]
    if not found.residuals and not found.notes and (told := _without_sums(found)) is not None:
        skipped.append(told)
    return Plan(
        type(found.model).__name__,
        coupling,
        tuple(Chain(tuple(_step(r) for r in chain)) for chain in chains),
        tuple(dict.fromkeys(skipped)),
    )


def _blocks(
    found: Probe, eligible: list[Residual], include: tuple[str, ...] | None, exclude: tuple[str, ...]
) -> list[Residual]:
    """The blocks that take no step away from the chains of residual additions."""
    chained = [r for chain in _chains(found, eligible, {}) for r in chain]
    # a block that is one residual addition from end to end is better off as that: no G(x) - x cancels in it
    same = {(r.entering, r.leaving) for r in eligible}
    held = {id(caller) for r in chained for caller in r.frame.callers}
    return [
        block
        for block in found.blocks
        if not block.refused
        and not _excluded(block.frame.path, include, exclude)
        and not held.intersection(map(id, block.inside))
        and (block.entering, block.leaving) not in same
    ]


def _chains(
    found: Probe, eligible: list[Residual], reasons: dict[tuple[str, int], str]
) -> list[list[Residual]]:
    """The chains of at least two steps, outermost first; notes why each other residual is in none."""
    while True:
        holders = {n: r for r in reversed(eligible) for n in r.inside if n is not r.total or r.block}
        inner = {id(r): outer for r in eligible if (outer := _enclosing(r, holders)) is not None}
        chains = _linked(found, [r for r in eligible if id(r) not in inner])
        kept = [chain for chain in chains if len(chain) >= MIN_STEPS]
        lone = {id(chain[0]) for chain in chains if len(chain) < MIN_STEPS}
        giving_way = lone & {id(outer) for outer in inner.values()}
        if not giving_way:
            break
        # a lone residual gives way to what runs inside its branch
        for residual in eligible:
            if id(residual) in giving_way and not residual.block:
                reasons[_key(residual)] = (
                    f"the residual at {residual.line} stands alone; what runs inside it counts"
                )
        eligible = [r for r in eligible if id(r) not in giving_way]
    in_chain = {_key(r) for chain in kept for r in chain}
    callers = {frame.caller: frame for frame in found.frames if frame.caller is not None}
    for residual in eligible:
        if _key(residual) in in_chain or residual.block:
            continue
        if (outer := inner.get(id(residual))) is not None:
            where = outer.frame.path or "(model)"
            reasons[_key(residual)] = f"runs inside the branch of {where}, which is rewired as a whole"
        else:
            shape, source = (
                "x".join(map(str, residual.skip.meta["value"].shape)),
                _source_of(residual, callers),
            )
            reasons[_key(residual)] = (
                f"the residual at {residual.line} stands alone: its trunk ({shape}) {source}, and no residual goes on "
                "with its sum unchanged"
            )
    return kept


def _source_of(residual: Residual, callers: dict[fx.Node, Frame]) -> str:
    """Where the trunk of a residual comes from, in words: the last operation that did more than rearrange it."""
    node, frame = residual.skip, residual.frame
    while True:
        inner = callers.get(node)
        if node.op == "placeholder":
            parent, caller = frame.parent, frame.caller
            if parent is None or caller is None or parent.graph is None:
                return "comes in from outside"
            leaves = tree_leaves((caller.args, caller.kwargs))
            source, frame = leaves[int(str(node.target)[len("input_") :])], parent
        elif rearranges(node):
            source = node.all_input_nodes[0]
        elif inner is not None and inner.graph is not None and inner.module._modules:
            source, frame = inner.graph.output_node().args[0], inner
        else:
            path = f"{frame.path}.{node.target}".lstrip(".") if node.op == "call_module" else name_of(node)
            line = "" if node.meta["line"].startswith("container.py") else f" ({node.meta['line']})"
            return f"comes out of {path}{line}"
        if not isinstance(source, fx.Node):
            return "comes in from outside"
        node = source


def _without_sums(found: Probe) -> Skipped | None:
    """Why a model without any residual addition has none, where that can be told."""
    nodes = (node for frame in found.frames if frame.graph is not None for node in frame.graph.nodes)
    joins = next((n for n in nodes if n.target in {torch.cat, torch.concat, torch.concatenate}), None)
    if joins is None:
        return None
    return Skipped(
        "", f"features are joined by concatenation ({joins.meta['line']}), never by adding to a trunk"
    )


def _linked(found: Probe, residuals: list[Residual]) -> list[list[Residual]]:
    chains: list[list[Residual]] = []
    open_ends: dict[Identity, list[Residual]] = {}
    for residual in residuals:
        at = next((a for a in sources(residual.entering, found.origins) if a in open_ends), None)
        if at is None:
            chains.append(chain := [])
        else:
            chain = open_ends.pop(at)
        chain.append(residual)
        open_ends[residual.leaving] = chain
    return chains


def _enclosing(residual: Residual, holders: dict[fx.Node, Residual]) -> Residual | None:
    """The outermost residual whose branch runs `residual`, of those whose branches `holders` maps the nodes of."""
    outermost = None if residual.block else holders.get(residual.total)
    for caller in residual.frame.callers:
        outermost = holders.get(caller, outermost)
    return outermost


def _excluded(path: str, include: tuple[str, ...] | None, exclude: tuple[str, ...]) -> str | None:
    for glob in exclude:
        if fnmatchcase(path, glob):
            return f"excluded by {glob!r}"
    if include is not None and not any(fnmatchcase(path, glob) for glob in include):
        return f"not included by {', '.join(map(repr, include))}"
    return None


def _matters(frame: Frame, planned: set[tuple[str, int]]) -> bool:
    """Whether an untraced frame is worth a word: it calls children, and nothing of it or around it is rewired."""
    if not frame.module._modules:
        return False
    around: Frame | None = frame
    while around is not None:
        if any(path == around.path for path, _ in planned):
            return False
        around = around.parent
    return not any(path.startswith(f"{frame.path}." if frame.path else "") for path, _ in planned)


def _key(residual: Residual) -> tuple[str, int]:
    return residual.frame.path, residual.index


def _step(residual: Residual) -> Step:
    return Step(
        module=residual.frame.path,
        residual=residual.index,
        trunk=tuple(residual.skip.meta["value"].shape),
        branch=tuple(dict.fromkeys(str(n.target) for n in residual.inside if n.op == "call_module")),
        sides=tuple(residual.frame.label(n) for n in residual.sides),
        post=residual.post_name,
        scale=None if residual.scale is None or residual.block else name_of(residual.scale),
        block=residual.block,
        line=residual.line,
    )
