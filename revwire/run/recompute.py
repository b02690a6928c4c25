"""A block that is run again in backward from its stored input, as activation checkpointing does.

It runs under the same conditions as a step's second run (random state, BatchNorm statistics moved once). Where a chain
ends in such a block, what is kept is the chain's last pair, which backward needs anyway, and not the merged tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.pytree import tree_flatten, tree_unflatten
from revwire.run.branch import Branch
from revwire.run.kept import Kept
from revwire.run.streams import Streams, settle
from revwire.run.tape import Link, Tape
from revwire.run.travelling import Travelling, is_travelling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from revwire.run.options import Options


def run_again(
    name: str,
    modules: Sequence[nn.Module],
    forward: Callable[..., Any],
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `forward(*args, **kwargs)` returns; it keeps its first tensor, or the pair of a chain's end, and runs again.

    Args:
        name: What messages call it.
        modules: The modules whose code and weights it runs.
        forward: What runs.
        options: Those of the rewired model.
        args: What it is called with, tensors or `Streams`.
        kwargs: The same, by name.
    """
    leaves, spec = tree_flatten((args, kwargs), is_leaf=is_travelling)
    first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor | Travelling)), None)
    dropping = options.replay and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if not dropping or first is None:
        return forward(*settle(args), **settle(kwargs))
    trunk = leaves[first]
    others = tuple(settle(leaf) for i, leaf in enumerate(leaves) if i != first)

    def run(x: Tensor, *rest: Any) -> Any:
        again, named = tree_unflatten([*rest[:first], x, *rest[first:]], spec)
        return forward(*again, **named)

    if isinstance(trunk, Streams) and not trunk.left:
        merge = trunk.merger()

        def run_on_pair(current: Tensor, previous: Tensor, *rest: Any) -> Any:
            return run(merge(previous, current), *rest)

        return _run_on(
            trunk.current, (trunk.previous, *others), Branch(name, run_on_pair, modules, check=options.check)
        )
    return _run_on(settle(trunk), others, Branch(name, run, modules, check=options.check))


def _run_on(x: Tensor, sides: tuple[Any, ...], branch: Branch) -> Any:
    """A step without a chain: its input is kept, and reconstructed by nobody."""
    link = Link(Tape(branch.name, noise=1.0), 0, branch, bottom=True)
    link.end = Kept(x, branch.name, "its input"), None
    return link.run(x, sides, drop=True)
