"""Choosing the dials so that a training step fits into given memory and loses as little time as it can.

Fastest first. Steps that keep their graph cost no second run. Anchored steps stop theirs before its last matrix
product, those first where that spares most. Then the transitions are run again, then branches are cut into slices.
Steps on small trunks keep their graph first: in a late stage of a pyramid, graphs are small for the time they save.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from revwire.errors import RevwireError, RewireError
from revwire.find.alike import kind_of
from revwire.measure.fake_step import Optimizer, TrainingStep
from revwire.measure.spared import spared
from revwire.planning.choose import nothing_to_rewire
from revwire.planning.dials import Dials, Transitions
from revwire.printing import in_words, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from revwire.measure.step import Loss
    from revwire.rewrite.recording import Recording

_LOG = logging.getLogger("revwire")
_ALMOST_ALL = 0.75
"""Of what anchors can spare; in a vision transformer those of the MLPs alone spare 0.8."""

Setting = tuple[Transitions, int]
"""What the transitions hold, and in how many slices branches run."""

_SETTINGS: tuple[Setting, ...] = (
    ("keep", 1),
    ("checkpoint", 1),
    ("checkpoint", 2),
    ("checkpoint", 4),
    ("checkpoint", 8),
    ("checkpoint", 16),
)


@dataclass(frozen=True)
class Budget:
    """The memory a training step may take, and what else `revwire.estimate` needs to know of the step.

    Attributes:
        limit: Bytes, or a size such as `"12GiB"`; of all that the step needs, parameters and optimizer state included.
        optimizer: As for `revwire.estimate`.
        loss_fn: As for `revwire.estimate`.
        autocast: As for `revwire.estimate`.
        accumulate: As for `revwire.estimate`.
        device: As for `revwire.estimate`.
    """

    limit: str | int
    optimizer: Optimizer = "adamw"
    loss_fn: Loss | None = None
    autocast: torch.dtype | None = None
    accumulate: bool = False
    device: str | torch.device | None = None


def dials_within(
    model: nn.Module,
    example_inputs: Any,
    budget: str | int | Budget,
    recording: Recording,
    *,
    overlap: bool = False,
) -> Dials:
    """The dials with which a step of `model` on these inputs fits.

    Args:
        model: The model as it was built.
        example_inputs: As for `revwire.rewire`; of the shapes of the step.
        budget: What it has to fit into.
        recording: A run of the model.
        overlap: Whether second runs overlap with gradients, which takes memory too.

    Raises:
        RewireError: nothing to rewire, or nothing fits; the message says by how much.
    """
    if not recording.fresh.chains:
        raise RewireError(nothing_to_rewire(recording.fresh))
    wanted = budget if isinstance(budget, Budget) else Budget(budget)
    limit = size_of(wanted.limit)
    levels = Levels.of(recording)
    step = TrainingStep.of(
        model,
        example_inputs,
        optimizer=wanted.optimizer,
        loss_fn=wanted.loss_fn,
        autocast=wanted.autocast,
        accumulate=wanted.accumulate,
        device=wanted.device,
    )
    optimization = step.optimized(step.on_meta(model)[0])
    peaks: dict[Dials, int] = {}

    def peak(setting: Setting, level: int) -> int:
        dials = levels.dials(setting, level)
        if dials not in peaks:
            chosen = dials.turned(recording.fresh, recording.found)
            try:
                rewired = recording.rewire(step.on_meta(model)[0], chosen, overlap=overlap)
                peaks[dials] = step.run(rewired, optimization).peak
            except RevwireError as error:
                raise RewireError(f"budget: the step cannot be estimated: {error}") from error
        return peaks[dials]

    if peak(_SETTINGS[0], levels.most) <= limit:
        return _say(limit, peak(_SETTINGS[0], levels.most), levels, _SETTINGS[0], levels.most)
    chosen, smallest = _setting(peak, levels.enough, limit)
    if chosen is None:
        raise RewireError(
            f"budget: the step needs at least {in_words(smallest)}, {in_words(smallest - limit)} more than "
            f"{in_words(limit)}; take a smaller batch (revwire.estimate(model, limit=...) says which fits), an "
            "optimizer with less state, or autocast"
        )
    level = _highest(partial(peak, chosen), levels.most, limit)
    return _say(limit, peak(chosen, level), levels, chosen, level)


def _setting(peak: Callable[[Setting, int], int], enough: int, limit: int) -> tuple[Setting | None, float]:
    """The setting that loses the least time within the limit, if one fits; and the smallest peak there is."""
    smallest, chosen = math.inf, None
    for setting in _SETTINGS:
        try:
            lowest = peak(setting, 0)
        except RewireError:
            if setting[1] == 1:
                raise
            break  # no branch can be cut
        smallest = min(smallest, lowest)
        if lowest <= limit:
            chosen = setting
            # slices cost less than second runs that go on to their last product
            if peak(setting, enough) <= limit:
                break
    return chosen, smallest


@dataclass(frozen=True)
class Levels:
    """From nothing kept (level 0) to all graphs kept: at each level one step more is anchored, then one more keeps.

    Attributes:
        steps: Names, those of short trunks first, and each chain's from its beginning: kept so, nothing is kept twice.
        anchored: The same names, those first that spare most of a second run for the bytes of an anchor.
        enough: The level from which almost all is spared that anchors can spare.
    """

    steps: tuple[str, ...]
    anchored: tuple[str, ...]
    enough: int

    @classmethod
    def of(cls, recording: Recording) -> Levels:
        """The levels of a recorded model."""
        chains = sorted(recording.fresh.chains, key=lambda chain: math.prod(chain.steps[0].trunk))
        steps = {step.name: step for chain in chains for step in chain.steps}
        kinds: dict[Any, int] = {}
        spares: dict[str, int] = {}
        for step in steps.values():
            residual = recording.found.residual(step)
            assert residual is not None
            kind = kind_of(residual)
            if kind not in kinds:
                kinds[kind] = spared(residual)
            spares[step.name] = kinds[kind]
        worth = {name: spares[name] / math.prod(step.trunk) for name, step in steps.items()}
        anchored = sorted(steps, key=lambda name: -worth[name])
        reached = itertools.accumulate(spares[name] for name in anchored)
        wanted = _ALMOST_ALL * sum(spares.values())
        enough = next((i for i, so_far in enumerate(reached, 1) if so_far >= wanted), len(steps))
        return cls(tuple(steps), tuple(anchored), enough)

    @property
    def most(self) -> int:
        """The highest level: all graphs are kept."""
        return 2 * len(self.steps)

    def dials(self, setting: Setting, level: int) -> Dials:
        """The dials at a level."""
        transitions, chunks = setting
        kept = self.steps[: max(0, level - len(self.steps))]
        anchored = tuple(name for name in self.anchored[:level] if name not in kept)
        return Dials(chunks, kept or None, anchored or None, transitions)


def _highest(peak: Callable[[int], int], most: int, limit: int) -> int:
    """The highest level within the limit, given that level 0 is."""
    low, high, halve = 0, most, False
    if peak(high) <= limit:
        return high
    while high - low > 1:
        share = 0.5 if halve else (limit - peak(low)) / (peak(high) - peak(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        if peak(guess) <= limit:
            low = guess
        else:
            high = guess
        halve = not halve
    return low


def _say(limit: int, peak: int, levels: Levels, setting: Setting, level: int) -> Dials:
    """Log what was chosen, and return it."""
    dials = levels.dials(setting, level)
    kept, anchored = (len(names) if isinstance(names, tuple) else 0 for names in (dials.keep, dials.anchor))
    said = [f"{kept} of {len(levels.steps)} steps keep their graph" if kept else ""]
    said += [f"{anchored} keep an input" if anchored or not kept else ""]
    said += [f"branches run in {dials.chunks} slices" if dials.chunks != 1 else ""]
    said += ["transitions run again" if dials.transitions == "checkpoint" else ""]
    sizes = f"{in_words(peak)} of {in_words(limit)}"
    _LOG.info("budget: the step takes %s: %s", sizes, ", ".join(filter(None, said)))
    return dials
