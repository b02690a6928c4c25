"""Measure bytes and seconds of one training step: every strategy on every model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.shared.strategies import GRAPHED, STRATEGIES
from revwire.errors import RevwireError
from revwire.measure.step import measure_step, training_step
from revwire.measure.timing import time_alternating

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from benchmarks.shared.strategies import Strategy
    from revwire.measure.step import Loss, StepMemory
    from revwire.measure.timing import Timing


@dataclass(frozen=True)
class Case:
    """One model and input to measure.

    Attributes:
        name: What the table calls it.
        factory: Makes the model, in the mode and on the device to measure. Called once; strategies get
            copies.
        inputs: What the model is called with: a tensor, a sequence of positional or a mapping of keyword
            arguments.
        loss_fn: From the output to a scalar; the mean square of the output if not given.
        about: Settings to write down beside the figures.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Any
    loss_fn: Loss | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """The figures of one strategy on one case; `failure` says why there are none."""

    case: str
    strategy: str
    memory: StepMemory | None = None
    timing: Timing | None = None
    failure: str = ""


def run(
    cases: Iterable[Case],
    strategies: Sequence[str] | Mapping[str, Strategy] = tuple(STRATEGIES),
    *,
    rounds: int = 5,
    autocast: torch.dtype | None = None,
    reported: tuple[type[Exception], ...] = (RevwireError,),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every strategy on every case.

    Args:
        cases: What to measure.
        strategies: Names in `STRATEGIES`, in the order of the rows; or other strategies, by name.
        rounds: Timed steps of each strategy; 0 leaves the clock out.
        autocast: Run forwards under autocast to this dtype.
        reported: Exceptions that become a row's failure; any other ends the run.
        progress: Called before each step, with what is about to run.

    Returns:
        A row for each strategy of each case. A strategy that cannot treat a model, or runs out of GPU memory,
        has a row that says so.
    """
    if not isinstance(strategies, Mapping):
        strategies = {name: STRATEGIES[name] for name in strategies}
    rows: list[Row] = []
    for case in cases:
        rows += _run_case(case, strategies, rounds, autocast, reported, progress)
    return rows


def failure_of(error: Exception) -> str:
    """What a row says of an error: our own messages as they are, others' in one line, with their type."""
    if isinstance(error, RevwireError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def steps_to_come(cases: int, strategies: int, rounds: int) -> int:
    """How often `run` calls its `progress` when nothing fails."""
    return cases * strategies * (1 + (rounds + 1 if rounds else 0))


def _run_case(
    case: Case,
    strategies: Mapping[str, Strategy],
    rounds: int,
    autocast: torch.dtype | None,
    reported: tuple[type[Exception], ...],
    progress: Callable[[str], None],
) -> list[Row]:
    model = case.factory()
    memory: dict[str, StepMemory] = {}
    steps: dict[str, Callable[[], None]] = {}
    failures: dict[str, str] = {}
    for name, strategy in strategies.items():
        progress(f"{case.name} {name}: bytes")
        try:
            treated = strategy(copy.deepcopy(model), case.inputs)
            step = training_step(treated, case.inputs, case.loss_fn, autocast=autocast)
            step()
            if name not in GRAPHED:  # a graph's own pool is no part of what is allocated in a step
                memory[name] = measure_step(treated, case.inputs, case.loss_fn, autocast=autocast)
        except torch.OutOfMemoryError:
            failures[name] = "out of GPU memory"
        except reported as error:
            failures[name] = failure_of(error)
        else:
            treated.zero_grad(set_to_none=True)
            steps[name] = step
    timings: dict[str, Timing] = {}
    if rounds and steps:
        timings = time_alternating(
            steps, rounds, progress=lambda name: progress(f"{case.name} {name}: seconds")
        )
    return [
        Row(case.name, name, memory.get(name), timings.get(name), failures.get(name, ""))
        for name in strategies
    ]
