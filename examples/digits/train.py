"""Train the small vision transformer that the digits example starts from: an ordinary model, not rewired.

    python -m examples.digits.train

It plays the pretrained model: the file it writes is what somebody would have on disk before hearing of
revwire. The same seed gives the same weights, bit for bit, on the same machine and torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from examples.digits import data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": data.SIZE,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": data.CLASSES,
    "embed_dim": 48,
    "depth": 8,
    "num_heads": 4,
}
WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")


class Schedule(Protocol):
    """What moves on with the optimizer: a learning rate, or the coefficients of a coupling."""

    def step(self) -> None:
        """Move one step on."""


def build(**changed: Any) -> nn.Module:
    """The untrained model: `timm.create_model(ARCHITECTURE, **MODEL_ARGS)`, with larger initial weights.

    Args:
        **changed: Arguments of the model that differ from `MODEL_ARGS`.
    """
    model: nn.Module = timm.create_model(ARCHITECTURE, **{**MODEL_ARGS, **changed})
    # timm's std of 0.02 suits widths of hundreds; at 48 the branches start near zero and take epochs to wake
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.3)
    return model


def train(
    digits: data.Digits,
    *,
    epochs: int = 100,
    seed: int = 0,
    batch: int = 64,
    learning_rate: float = 2e-3,
    progress: Callable[[range], Any] = iter,
) -> nn.Module:
    """Train a fresh model: AdamW, a warm-up and a cosine, label smoothing, augmentation.

    Args:
        digits: What `data.load` returns; only its training part is looked at.
        epochs: How often to go through the training images.
        seed: Seed of the initial weights, the order and the augmentation.
        batch: Images in a step.
        learning_rate: The highest learning rate, reached after a twentieth of the steps.
        progress: Wraps the range of epochs, to show how far the training is.

    Returns:
        The trained model, in eval mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, fused=True)
    steps = epochs * (len(digits.train.labels) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_and_cosine(steps))
    for _ in progress(range(epochs)):
        one_epoch(model, data.batches(digits.train, batch, generator), optimizer, schedule)
    return model.eval()


def one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *schedules: Schedule,
) -> None:
    """Train on all batches once; every schedule goes one step on after every optimizer step."""
    for images, labels in batches:
        loss = functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for schedule in schedules:
            schedule.step()


def save(model: nn.Module, path: Path, accuracy: float) -> None:
    """Write the weights, with what it takes to build the model again in the file's metadata."""
    metadata = {
        "architecture": ARCHITECTURE,
        "model_args": json.dumps(MODEL_ARGS),
        "test_accuracy": f"{accuracy:.4f}",
    }
    save_file(model.state_dict(), path, metadata=metadata)


def _warmup_and_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def main(
    epochs: Annotated[int, typer.Option(min=1, help="How often to go through the training images.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order and the augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="The file to write.")] = WEIGHTS,
) -> None:
    """Train a small vision transformer on scikit-learn's digits and write it as a safetensors file.

    Example: python -m examples.digits.train --epochs 5 --out /tmp/digits.safetensors
    """
    console = Console()
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(1)  # no slower at this size, and no sum depends on how many cores there are
    digits = data.load()

    def bar(epochs: range) -> Any:
        return track(epochs, "training", console=console)

    model = train(digits, epochs=epochs, seed=seed, progress=bar)
    test, training = data.accuracy(model, digits.test), data.accuracy(model, digits.train)
    save(model, out, test)
    console.print(
        f"{ARCHITECTURE} {MODEL_ARGS}\n"
        f"test accuracy {test:.2%} of {len(digits.test.labels)} images, training {training:.2%}\n"
        f"written: {out} ({out.stat().st_size / 1e6:.2f} MB)"
    )


if __name__ == "__main__":
    typer.run(main)
