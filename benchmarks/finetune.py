"""Which coupling to take: a trained network rewired with each, and fine-tuned, on scikit-learn's digits.

    python -m benchmarks.finetune --help

A small vision transformer and a small ResNet are trained normally to convergence, then rewired with every coupling,
in float and exact, and fine-tuned for ten epochs; so is the network as it was, and one from scratch. Test accuracy is
that of the rewired network in eval mode, right after rewiring and after 1, 2, 5 and 10 epochs. This replays, at a size
that runs on one core, two claims: Re2TAL's (pretrained parameters make rewired training short) and Dr2Net's (no loss
at the start). A seed decides the weights, the order of the images and their augmentation; the file is written after
every seed, and a run goes on where it was stopped.
"""

from __future__ import annotations

import copy
import json
import statistics
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import timm
import torch
import typer
from rich.table import Table
from torch import nn

import revwire
from benchmarks.shared import result_files, terminal
from examples.digits import data
from examples.digits import train as digits_vit

if TYPE_CHECKING:
    from collections.abc import Callable

EPOCHS = 10
SHOWN = (0, 1, 2, 5, 10)
PRETRAINING_EPOCHS = 40
BATCH = 128
LEARNING_RATE = 7e-4
PRETRAINING_RATE = 3e-3
_EXAMPLE_INPUT = torch.zeros(2, 1, data.SIZE, data.SIZE)


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    Attributes:
        name: What the table calls it.
        coupling: What the network is rewired with; None leaves it as it is.
        exact: Whether streams are in fixed point.
        end: Where (alpha, beta) move to over the first half of the steps; None where they stay.
        scratch: Whether the weights are fresh ones.
    """

    name: str
    coupling: str | None = None
    exact: bool = False
    end: tuple[float, float] | None = None
    scratch: bool = False


_DR2NET = "dr2net(alpha=0.875,beta=0.125)"
COUPLINGS = ("re2tal", _DR2NET, "momentum(gamma=0.5)", "bdia(gamma=0.5)")
WAYS = (
    Way("plain"),
    *(Way(f"{c}, {'exact' if e else 'float'}", c, e) for c in COUPLINGS for e in (False, True)),
    *(Way(f"dr2net scheduled to {end}, exact", _DR2NET, True, end) for end in ((0.5, 0.5), (0.0, 1.0))),
    Way("from scratch", scratch=True),
)


def resnet() -> nn.Module:
    """A ResNet for 8x8 images: stages of 4, 4, 1 and 1 basic blocks, so two chains of three steps."""
    sizes: dict[str, Any] = {"layers": (4, 4, 1, 1), "channels": (16, 32, 32, 32)}
    model: Any = timm.models.ResNet(
        timm.models.resnet.BasicBlock, in_chans=1, num_classes=data.CLASSES, **sizes
    )
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    assert isinstance(model, nn.Module)
    return model


def vit() -> nn.Module:
    """A vision transformer for 8x8 images: four patches, six blocks, so one chain of twelve steps."""
    return digits_vit.build(depth=6, patch_size=4)


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "resnet": resnet}


def fit(
    model: nn.Module,
    digits: data.Digits,
    epochs: int,
    rate: float,
    seed: int,
    schedule: revwire.Dr2NetSchedule | None = None,
) -> list[float]:
    """Train, and return the test accuracy before the first and after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(digits.train.labels) // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    found = [data.accuracy(model, digits.test)]
    for _ in range(epochs):
        batches = data.batches(digits.train, BATCH, generator)
        digits_vit.one_epoch(model, batches, optimizer, rates, *filter(None, (schedule,)))
        found.append(data.accuracy(model, digits.test))
    return found


def pretrained(name: str, digits: data.Digits, seed: int) -> nn.Module:
    """A network trained normally."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    fit(model, digits, PRETRAINING_EPOCHS, PRETRAINING_RATE, seed)
    return model


def run_way(way: Way, start: nn.Module, name: str, digits: data.Digits, seed: int) -> list[float]:
    """The accuracies of one way to fine-tune `start`."""
    torch.manual_seed(1000 + seed)
    model = MODELS[name]() if way.scratch else copy.deepcopy(start)
    schedule = None
    if way.coupling is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that float streams cannot carry it is what the table shows
            revwire.rewire(model, _EXAMPLE_INPUT, coupling=way.coupling, exact=way.exact)
        if way.end:
            half = EPOCHS * (len(digits.train.labels) // BATCH) // 2
            schedule = revwire.Dr2NetSchedule(model, half, start=(0.875, 0.125), end=way.end)
    return fit(model, digits, EPOCHS, LEARNING_RATE, 100 + seed, schedule)


def mean_and_spread(runs: list[list[float]], epoch: int) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, in percent."""
    values = [100 * run[epoch] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_way(document: dict[str, Any], model: str) -> dict[str, list[list[float]]]:
    """The accuracies of every seed, by the name of the way."""
    seeds = document["runs"][model].values()
    names = dict.fromkeys(name for seed in seeds for name in seed)
    return {name: [seed[name] for seed in seeds if name in seed] for name in names}


def table(document: dict[str, Any]) -> Table:
    """Mean and spread of the test accuracy of every way."""
    shown = Table(
        title="test accuracy in percent: mean ± standard deviation over seeds", title_justify="left"
    )
    shown.add_column("model")
    shown.add_column("way")
    for epoch in SHOWN:
        shown.add_column("at once" if not epoch else f"epoch {epoch}", justify="right")
    for model in document["runs"]:
        for name, runs in by_way(document, model).items():
            cells = (mean_and_spread(runs, epoch) for epoch in SHOWN)
            shown.add_row(model, name, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in cells))
    return shown


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw accuracy over epochs; the bars are one standard deviation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(document["runs"]), figsize=(14, 5), squeeze=False, layout="constrained"
    )
    colours: dict[str, str] = {"plain": "black", "from scratch": "gray"}
    for axis, model in zip(axes[0], document["runs"], strict=True):
        for name, runs in by_way(document, model).items():
            points = [mean_and_spread(runs, epoch) for epoch in SHOWN]
            # float and exact streams of a coupling share its colour
            kind = name.removesuffix(", float").removesuffix(", exact")
            look: dict[str, Any] = {
                "fmt": ":" if name.endswith("float") else "-",
                "capsize": 2,
                "label": name,
            }
            look["color"] = colours.setdefault(kind, f"C{len(colours) - 2}")
            axis.errorbar(SHOWN, [m for m, _ in points], [s for _, s in points], **look)
        axis.set(title=model, xlabel="epochs of fine-tuning", ylabel="test accuracy, %", ylim=(88, 100.2))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    model: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(MODELS)}; repeat; all.")] = None,
    out: Annotated[
        Path, typer.Option(help="The JSON file; the picture goes beside it.")
    ] = result_files.RESULTS / "finetune.json",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
) -> None:
    """Fine-tune rewired networks on digits, print the accuracies and write them down.

    Quick look: python -m benchmarks.finetune --seeds 1 --model vit --out /tmp/finetune.json
    """
    console = terminal.console()
    torch.set_num_threads(1)
    digits = data.load()
    settings = {"epochs": EPOCHS, "pretraining_epochs": PRETRAINING_EPOCHS, "batch": BATCH}
    settings |= {"learning_rate": LEARNING_RATE, "pretraining_rate": PRETRAINING_RATE}  # type: ignore[dict-item]
    document: dict[str, Any] = {"settings": settings, "ways": [asdict(way) for way in WAYS], "runs": {}}
    if out.is_file() and not fresh:
        before = json.loads(out.read_text(encoding="utf-8"))
        if (before["settings"], before["ways"]) != (document["settings"], document["ways"]):
            raise typer.BadParameter(
                f"{out} was measured with other settings; pass --fresh", param_hint="--out"
            )
        document = before
    for seed in range(seeds):
        for name in model or MODELS:
            done = document["runs"].setdefault(name, {})
            if str(seed) in done:
                continue
            with console.status(f"{name}, seed {seed}: training") as status:
                start = pretrained(name, digits, seed)
                found = {}
                for way in WAYS:
                    status.update(f"{name}, seed {seed}: {way.name}")
                    found[way.name] = run_way(way, start, name, digits, seed)
            done[str(seed)] = found
            document |= result_files.origin("benchmarks.finetune")
            result_files.write(document, out)
    plot(document, out.with_suffix(".png"))
    console.print(table(document), f"written: {out}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
