"""The whole job on a real checkpoint and real data: convert, verify, fine-tune the rewired model, measure.

    python -m examples.digits.demo

It starts from `digits_vit.safetensors`, an ordinary small vision transformer (`examples/digits/train.py` trained it),
and does what a user does with a pretrained model of their own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import revwire
from benchmarks.shared import step_measurement, step_report
from examples.digits import data, train
from revwire.checkpoint import load_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LEARNING_RATE = 1e-3
BATCH = 64


def finetune(
    model: nn.Module,
    digits: data.Digits,
    *,
    epochs: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[float]:
    """Fine-tune a model as one fine-tunes any: nothing here knows whether it is rewired.

    Args:
        model: The model; trained in place, left in eval mode.
        digits: What `data.load` returns.
        epochs: How often to go through the training images.
        seed: Seed of the order and the augmentation.
        learning_rate: The highest learning rate; it falls to zero along a cosine.
        progress: Wraps the range of epochs, to show how far the training is.

    Returns:
        Test accuracy after each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * (len(digits.train.labels) // BATCH)
    )
    accuracies = []
    for _ in progress(range(epochs)):
        model.train()
        for images, labels in data.batches(digits.train, BATCH, generator):
            loss = functional.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        accuracies.append(data.accuracy(model, digits.test))
    model.eval()
    return accuracies


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning the rewired model.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the order and the augmentation.")] = 0,
    weights: Annotated[Path, typer.Option(help="The trained model to start from.")] = train.WEIGHTS,
) -> None:
    """Convert the trained digits model, verify it, fine-tune it rewired, and measure what it saves.

    Example: python -m examples.digits.demo --epochs 10
    """
    console = Console()
    torch.set_num_threads(1)  # no slower at this size, and the figures do not depend on the cores there are
    digits = data.load()
    original, _ = load_plain(weights)
    before = data.accuracy(original.eval(), digits.test)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digits_vit.revwire.safetensors"
        console.rule("revwire convert digits_vit.safetensors")
        with console.status("converting") as status:
            done = revwire.convert(weights, out, progress=status.update)
        console.print(done)
        if not done.ok:
            raise typer.Exit(1)
        model = revwire.load(out)

    console.rule("fine-tuning the rewired model")
    rewired = data.accuracy(model, digits.test)
    after = finetune(
        model, digits, epochs=epochs, seed=seed, progress=lambda r: track(r, "epochs", console=console)
    )
    table = Table(title=f"test accuracy, {len(digits.test.labels)} images", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_row("original", f"{before:.1%}")
    table.add_row("right after rewiring", f"{rewired:.1%}")
    for epoch, accuracy in enumerate(after, start=1):
        table.add_row(f"fine-tuned, epoch {epoch}", f"{accuracy:.1%}")
    console.print(table)

    console.rule("memory and time of one training step")
    images, labels = digits.train.images[:256], digits.train.labels[:256]

    def loss(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels)

    case = step_measurement.Case("digits ViT, batch 256", load_plain(weights)[0].train, images, loss)
    with console.status("measuring"):
        rows = step_measurement.run([case], rounds=5)
    console.print(step_report.table(rows))
    console.print(
        f"Rewiring changed the function: {before:.1%} became {rewired:.1%}, and fine-tuning brought {after[-1]:.1%}.\n"
        "Held: bytes alive between forward and backward. Every step of training takes what the last row says."
    )


if __name__ == "__main__":
    typer.run(main)
