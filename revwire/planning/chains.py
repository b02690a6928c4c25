"""Which residuals follow each other on one trunk: the chains of a recorded run, and why the rest is in none.

A residual follows another when its skip is the very tensor that the other one's sum became, at most rearranged in
between. Residuals that run inside the branch of a chained one are left alone. A residual that is in no chain but has
one inside its branch is left alone itself, and the inner chain is taken.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import fx

from revwire.find.probe import Probe, key_of, sources
from revwire.planning.plan import Chain, Plan, Skipped, Step
from revwire.pytree import tree_leaves
from revwire.trace.graph import rearranges
from revwire.trace.operation import name_of

if TYPE_CHECKING:
    from revwire.find.residual import Residual
    from revwire.trace.frame import Frame, Identity


MIN_STEPS = 2


"""A chain of one step is no gain: it would hold two streams where autograd holds one branch."""


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
        reason = reason or found.training.refuses(residual)
        if reason:
            reasons[key_of(residual)] = reason
        else:
            eligible.append(residual)
    if blocks and found.blocks and (whole := _blocks(found, eligible, include, exclude)):
        eligible = sorted((*eligible, *whole), key=lambda r: r.total.meta["order"])
    chains = _chains(found, eligible, reasons)
    planned = {key_of(r) for chain in chains for r in chain}
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
        and not found.training.refuses(block)
        and not _excluded(block.frame.path, include, exclude)
        and not held.intersection(map(id, block.inside))
        and (block.entering, block.leaving) not in same
    ]


def _chains(
    found: Probe, eligible: list[Residual], reasons: dict[tuple[str, int], str]
) -> list[list[Residual]]:
    """The chains of at least two steps, outermost first; notes why each other residual is in none."""
    parted: dict[tuple[str, int], str] = {}
    while True:
        holders = {n: r for r in reversed(eligible) for n in r.inside if n is not r.total or r.block}
        inner = {id(r): outer for r in eligible if (outer := _enclosing(r, holders)) is not None}
        chains = _linked(found, [r for r in eligible if id(r) not in inner], parted)
        kept = [chain for chain in chains if len(chain) >= MIN_STEPS]
        lone = {id(chain[0]) for chain in chains if len(chain) < MIN_STEPS}
        giving_way = lone & {id(outer) for outer in inner.values()}
        if not giving_way:
            break
        # a lone residual gives way to what runs inside its branch
        for residual in eligible:
            if id(residual) in giving_way and not residual.block:
                reasons[key_of(residual)] = (
                    f"the residual at {residual.line} stands alone; what runs inside it counts"
                )
        eligible = [r for r in eligible if id(r) not in giving_way]
    in_chain = {key_of(r) for chain in kept for r in chain}
    callers = {frame.caller: frame for frame in found.frames if frame.caller is not None}
    for residual in eligible:
        if key_of(residual) in in_chain or residual.block:
            continue
        if (outer := inner.get(id(residual))) is not None:
            where = outer.frame.path or "(model)"
            reasons[key_of(residual)] = f"runs inside the branch of {where}, which is rewired as a whole"
        else:
            shape, source = (
                "x".join(map(str, residual.skip.meta["value"].shape)),
                _source_of(residual, callers),
            )
            if why := parted.get(key_of(residual)):
                reasons[key_of(residual)] = why
                continue
            reasons[key_of(residual)] = (
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


def _linked(
    found: Probe, residuals: list[Residual], parted: dict[tuple[str, int], str]
) -> list[list[Residual]]:
    """The residuals on one trunk in both modes, in the order they run; notes where training leaves it in `parted`."""
    chains: list[list[Residual]] = []
    open_ends: dict[Identity, list[Residual]] = {}
    for residual in residuals:
        at = next((a for a in sources(residual.entering, found.origins) if a in open_ends), None)
        chain = [] if at is None else open_ends.pop(at)
        if chain and found.training.parts(chain[-1], residual):
            where = f"between {chain[-1].line} and {residual.line}"
            for r in (chain[-1], residual):
                parted[key_of(r)] = (
                    f"in training the code {where} changes the trunk, so no chain goes on there in either mode"
                )
            chain = []
        if not chain:
            chains.append(chain)
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
