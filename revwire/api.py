"""The two calls that users make: look at what would be rewired, and do it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from revwire.experimental.overlap import EXPERIMENTAL
from revwire.measure.rewired import chosen_for, rewired

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from revwire.measure.budget import Budget
    from revwire.planning.dials import Globs, Transitions
    from revwire.planning.plan import Plan
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Grid
    from revwire.run.options import Fallback


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Coupling | None = None,
    exact: bool | int | Grid | None = None,
    include: Globs = None,
    exclude: Globs = None,
    chunks: int | Mapping[str, int] = 1,
    keep: Globs | int = None,
    anchor: Globs = None,
    transitions: Transitions = "keep",
) -> Plan:
    """What `rewire` would do to `model`, and why not the rest. Changes nothing.

    Args:
        model: Any module; it runs once on fake tensors, which takes no memory and draws no random numbers.
        example_inputs: What its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments. May be
            left out for models of timm, torchvision and transformers, whose own is known.
        coupling: As for `revwire.rewire`, like the next three.
        exact: Whether streams are in fixed point.
        include: Globs of module paths (`"blocks.*"`); only what matches one is rewired.
        exclude: Globs of module paths to leave alone.
        chunks: Slices that branches run in, as for `revwire.rewire`, like the next three.
        keep: Steps that keep the graph of their branch.
        anchor: Steps that keep the input of the step before them.
        transitions: What the blocks between chains hold.

    Raises:
        RewireError: the model is rewired already, does not run on the inputs, or the inputs are not known.
    """
    _, chosen = chosen_for(
        model,
        example_inputs,
        coupling=coupling,
        exact=exact,
        include=include,
        exclude=exclude,
        chunks=chunks,
        keep=keep,
        anchor=anchor,
        transitions=transitions,
    )
    return chosen


def rewire(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Coupling | None = None,
    exact: bool | int | Grid | None = None,
    include: Globs = None,
    exclude: Globs = None,
    chunks: int | Mapping[str, int] = 1,
    keep: Globs | int = None,
    anchor: Globs = None,
    transitions: Transitions = "keep",
    budget: str | int | Budget | None = None,
    plan: Plan | None = None,
    compile: bool = False,  # noqa: A002 - as torch and Lightning name it
    overlap: bool = False,
    check: bool = True,
    fallback: Fallback = "error",
) -> nn.Module:
    """Turn the chains of residual blocks of `model` into reversible ones, in place.

    The model keeps its class (to `isinstance`), its parameters and their names; training it keeps no activations of
    the chains. What it computes is up to the coupling: with the default another function than before (see
    `revwire.Re2TAL`), so fine-tune it; `BDIA`, `Dr2Net` and `Momentum` keep the function or start near it.

    Args:
        model: Any module.
        example_inputs: As for `revwire.plan`.
        coupling: The recurrence, as an object or by name, with or without coefficients: `"re2tal"`, `"dr2net"`,
            `"momentum"`, `"bdia"`, `"dr2net(alpha=1,beta=0.125)"`. None: that of `plan`; of a model of transformers
            that was saved rewired, what its config.json says, chains and all; else `"re2tal"`.
        exact: Streams in fixed point, so that backward reconstructs every input bit for bit, at any depth and with
            any |a| of 1, 1/2, 1/4, ...: True for a grid that follows the values entering each chain, or
            `revwire.Grid(bits)` (or just the number of bits after the point) for the same one everywhere. None: as
            for `coupling`, else False.
        include: Globs of module paths (`"blocks.*"`); only what matches one is rewired.
        exclude: Globs of module paths to leave alone.
        chunks: Run each branch on so many slices of the batch, in forward and backward, so that it needs so much less
            memory; or a dict of globs of steps (`"blocks.*#1"`) or modules to numbers. Of a single long video, tokens
            are cut where the branch treats them alike, and softmax attention inside a branch. Where samples mix
            (BatchNorm) the branch runs whole, and the plan says why.
        keep: Globs of steps whose branches keep their graph, and do not run again; or how many steps from the
            beginning of each chain do.
        anchor: Globs of steps that keep the input of the step before them, as checkpointing does, so that their
            second run stops before its last product.
        transitions: `"checkpoint"` to have the blocks between chains (stem, downsampling, last norm) run again in
            backward from their stored input; the pair that leaves a chain is stored once then.
        budget: The bytes that a training step with these example inputs may take, `"12GiB"` or a `revwire.Budget` that
            says more of the step (optimizer, autocast): the dials above are chosen so that it fits and loses as little
            time as it can, by `revwire.estimate`, and the choice is logged. Takes some steps on fake tensors.
        plan: A plan made earlier (of the same architecture); its chains are rewired instead of a fresh choice, with
            the dials that it was made with.
        compile: Have torch.compile run the branches: one compilation for all blocks that are alike. The first steps
            take as long as compiling does; kernels are fused, so numbers differ by rounding.
        overlap: Experimental, and says so: on a GPU, run a step's branch again on a stream of its own while the
            gradients of the step after it are computed; it takes the insides of one more branch. The same numbers.
            Branches in slices and exact chains run one after the other all the same, and so does everything on a CPU.
        check: Compare a few numbers of every second run with those of the first, and raise `revwire.ReplayError` where
            they differ by more than rounding: something that the branch depends on has changed. Costs less than 1 % of
            a step; leave it on.
        fallback: What a call of a rewired module does that cannot be traced (another signature than was planned, whose
            code decides by numbers): `"error"` raises a RewireError that says why; `"original"` runs the module's own
            forward with a warning, which is another function than the rewired one, and keeps all that autograd saves.

    Returns:
        The same model.

    Raises:
        RewireError: no chain was found, the model is rewired already, `plan` does not fit, or nothing fits `budget`;
            the model is as it was.
    """
    # long: the one place where each argument of the one call is told
    model, chosen = rewired(
        model,
        example_inputs,
        coupling=coupling,
        exact=exact,
        include=include,
        exclude=exclude,
        chunks=chunks,
        keep=keep,
        anchor=anchor,
        transitions=transitions,
        budget=budget,
        plan=plan,
        compile=compile,
        overlap=overlap,
        check=check,
        fallback=fallback,
    )
    if overlap:
        warnings.warn(EXPERIMENTAL, stacklevel=2)
    for warning in chosen.warnings:
        warnings.warn(warning, stacklevel=2)
    return model
