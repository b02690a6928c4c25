"""The same residual branches through revwire and through other packages for reversible networks, side by side.

    pip install -e '.[bench,peers]'    # or any of the four packages in the versions named there; --no-deps will do
    python -m benchmarks.peers --help

The work is the same everywhere: a stack of branches F_0, F_1, ..., by turns `LayerNorm, attention` and `LayerNorm,
MLP`, all of the same width, the same modules with the same weights, each run once in forward on a tensor (batch,
tokens, dim). What differs is how a branch's output is added, and what is kept for backward:

- plain: autograd through Re2TAL's recurrence, `s[k+1] = s[k-1] + F_k(s[k])`, `s[-1] = s[0] = x`; out comes the mean of
  the last two. Ratios are to this.
- checkpoint: the ordinary network, `x = x + F_k(x)`, each block of two branches under torch's non-reentrant
  checkpoint. What one would use instead of a reversible network.
- memcnn, RevTorch, revlib: RevNet's form, `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)` for each block of two branches. It is
  given `x1 = x2 = x`, joined in the last dimension to a tensor of twice the width, which the package splits in half
  again, so that each branch sees `dim` channels; out comes the mean of both halves. This is plain's recurrence, two
  steps at a time. memcnn: an InvertibleModuleWrapper around an AdditiveCoupling for each block, all clearing their
  inputs. RevTorch: one ReversibleSequence. revlib: one ReversibleSequential, mode autograd_function (its default).
- momentumnet: MomentumNet, gamma = 0.9, use_backprop=False: `v = 0.9 v + 0.1 F_k(x)`, `x = x + v`, v = 0 at first;
  one stream in and out, v in 64-bit integers (where 0.9 is 58983 / 65536).
- revwire: an nn.Sequential of blocks `x + F_k(x)`, given to `revwire.rewire`: plain's recurrence.

A way whose package is not installed, or no longer runs with this torch, has a row with its error.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.shared import result_files, step_report, terminal
from benchmarks.shared.peer_networks import WAYS, Stack, Way, attention_branch, mlp_branch
from benchmarks.shared.step_measurement import Case, Row, failure_of, run, steps_to_come

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from benchmarks.shared.peer_networks import Build

OFF = (
    "Off: |a - b| / |b|, b from plain autograd through the same recurrence (checkpoint: of the ordinary network, "
    "momentumnet: of its own with gamma = 0.9, all others: Re2TAL's); of the output, and of the gradients of all "
    "parameters and the input as one vector, where a missing gradient counts as 0."
)


class Dtype(str, Enum):
    """Of weights and input."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Off:
    """How far a way is from plain autograd through the same recurrence, as parts of that."""

    output: float
    gradient: float


def stack_case(
    *,
    branches: int = 24,
    dim: int = 256,
    heads: int = 4,
    batch: int = 8,
    tokens: int = 196,
    dtype: Dtype = Dtype.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """The stack with random weights, a random input that needs a gradient, and a random linear loss.

    A linear loss keeps nothing of the output: what is held is the stack's.
    """
    torch.manual_seed(seed)
    made = [mlp_branch(dim) if k % 2 else attention_branch(dim, heads) for k in range(branches)]
    placed = {"dtype": getattr(torch, dtype.value), "device": device}
    stack = Stack(made).to(**placed).train()
    inputs = torch.randn(batch, tokens, dim, **placed)
    direction = torch.randn_like(inputs)
    about = {"branches": branches, "dim": dim, "heads": heads, "batch": batch, "tokens": tokens}
    return Case(
        name=f"{branches} branches, dim {dim}, batch {batch}, {tokens} tokens, {dtype.value}",
        factory=lambda: stack,
        inputs=inputs.requires_grad_(),
        loss_fn=lambda output: (output * direction).sum(),
        about={**about, "dtype": dtype.value},
    )


def compare(
    case: Case,
    ways: Mapping[str, Way] = WAYS,
    *,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], dict[str, Off]]:
    """Measure every way on the stack of `case`, and how far its gradients are from plain autograd's.

    Args:
        case: What `stack_case` made.
        ways: The ways, by name, in the order of the rows.
        rounds: Timed steps of each way, in which they take turns; 0 leaves the clock out.
        progress: Called before each step, with what is about to run.

    Returns:
        A row for each way, and the distances of those that ran. A way that cannot be built or run has a row that says
        why.
    """
    strategies = {name: _strategy(way.build) for name, way in ways.items()}
    rows = run([case], strategies, rounds=rounds, reported=(Exception,), progress=progress)
    found = {}
    for at, row in enumerate(rows):
        if row.failure:
            continue
        progress(f"{row.strategy}: gradients")
        try:
            found[row.strategy] = off(case, ways[row.strategy])
        except Exception as error:  # noqa: BLE001 - others' code; its row says what it raised
            rows[at] = Row(row.case, row.strategy, failure=failure_of(error))
    return rows, found


def _strategy(build: Build) -> Callable[[nn.Module, Any], nn.Module]:
    def strategy(stack: nn.Module, inputs: Any) -> nn.Module:  # noqa: ARG001 - all strategies take the same
        assert isinstance(stack, Stack)
        return build(stack)

    return strategy


def off(case: Case, way: Way) -> Off:
    """How far the output and the gradients of `way` are from plain autograd's through the same recurrence."""
    found = _output_and_gradients(case, way.build)
    expected = _output_and_gradients(case, lambda stack: way.recurrence(stack.branches))
    return Off(_distance(found[:1], expected[:1]), _distance(found[1:], expected[1:]))


def _output_and_gradients(case: Case, build: Build) -> list[Tensor]:
    stack = copy.deepcopy(case.factory())
    assert isinstance(stack, Stack)
    # the network that is built runs the same modules, so these are its parameters, whatever it calls them
    leaves = [*stack.parameters(), case.inputs.detach().clone().requires_grad_()]
    output = build(stack)(leaves[-1])
    assert case.loss_fn
    case.loss_fn(output).backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [output.detach(), *gradients]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return float((difference / torch.stack([b.square().sum() for _, b in pairs]).sum()).sqrt())


def off_table(found: Mapping[str, Off]) -> Table:
    """The distances to print."""
    result = Table(title="off from plain autograd", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    result.add_column("strategy", no_wrap=True)
    for heading in ("gradient", "output"):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, distance in found.items():
        result.add_row(escape(name), f"{distance.gradient:.1e}", f"{distance.output:.1e}")
    return result


def document(
    case: Case, rows: Sequence[Row], found: Mapping[str, Off], settings: dict[str, Any]
) -> dict[str, Any]:
    """All there is to know about a run, JSON-ready, with the versions of the packages compared."""
    result = step_report.document([case], rows, "benchmarks.peers", settings)
    result["method"] += " " + OFF
    result["versions"] |= package_versions(WAYS)
    for entry in result["rows"]:
        if entry["strategy"] in found:
            distance = found[entry["strategy"]]
            entry |= {"gradient_off": distance.gradient, "output_off": distance.output}
    return result


def package_versions(ways: Mapping[str, Way]) -> dict[str, str]:
    """Versions of the packages that the ways need."""
    found = {}
    for way in ways.values():
        if way.package:
            try:
                found[way.package] = metadata.version(way.package)
            except metadata.PackageNotFoundError:
                found[way.package] = "not installed"
    return found


def main(
    branches: Annotated[int, typer.Option(min=2, help="Branches, an even number.")] = 24,
    dim: Annotated[int, typer.Option(min=1, help="Channels of a token.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Heads of attention; dim is a multiple.")] = 4,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Samples in a step.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 196,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and input.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of each; 0: no clock.")] = 5,
    way: Annotated[
        list[str] | None,
        typer.Option("--way", "-w", help=f"One of {', '.join(WAYS)}; repeat; all if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, input and loss.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the JSON and PNG files.", show_default="benchmarks/results")
    ] = result_files.RESULTS,
    name: Annotated[str | None, typer.Option(help="Their name; peers-DEVICE-DTYPE if not given.")] = None,
) -> None:
    """Measure one training step of the same branches in every package, print it and write it down.

    Quick look: python -m benchmarks.peers --branches 4 --dim 32 --batch 2 --rounds 1 --out /tmp/peers

    Deep: python -m benchmarks.peers --branches 192 --tokens 49 --rounds 3 --name peers-deep

    On a GPU: python -m benchmarks.peers --device cuda --batch 64 --dim 768 --heads 12
    """
    if branches % 2:
        raise typer.BadParameter(f"{branches} is odd: a block has two branches", param_hint="--branches")
    if dim % heads:
        raise typer.BadParameter(f"{dim} channels do not divide into {heads} heads", param_hint="--heads")
    if unknown := [w for w in way or () if w not in WAYS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(WAYS)}", param_hint="--way")
    console = terminal.console()
    ways = {w: WAYS[w] for w in way or WAYS}
    case = stack_case(
        branches=branches,
        dim=dim,
        heads=heads,
        batch=batch,
        tokens=tokens,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    steps = steps_to_come(1, len(ways), rounds) + len(ways)
    with terminal.progress_bar(steps) as progress, warnings.catch_warnings():
        # of what the packages use of torch that is deprecated: it still works, or is their row's error
        warnings.filterwarnings("ignore", module="memcnn|revtorch|revlib|momentumnet")
        rows, found = compare(case, ways, rounds=rounds, progress=progress)
    written = document(case, rows, found, {"device": device, "rounds": rounds, "seed": seed})
    caption = result_files.caption(written)
    console.print(step_report.table(rows), off_table(found), caption, step_report.METHOD, OFF, sep="\n")
    stem = out / (name or f"peers-{torch.device(device).type}-{dtype.value}")
    console.print("written:", *step_report.save(written, rows, stem))


if __name__ == "__main__":
    typer.run(main)
