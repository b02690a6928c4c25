"""Fine-tune the backbone on the classes of actions before detection: the first of Re2TAL's two steps.

The backbone is laid out by the setting `memory`, so a rewired one gets used to its new wiring here. A linear layer on
the mean of the features under an action tells its class. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from examples.re2tal.data.dataset import collate
from examples.re2tal.detector import AMP
from examples.re2tal.distributed.parallel import gathered_weights
from examples.re2tal.distributed.world import joined
from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.classification import SegmentClassifier
from examples.re2tal.training.logs import Log
from examples.re2tal.training.trainer import Trainer
from examples.re2tal.weights.families import note

if TYPE_CHECKING:
    from pathlib import Path

    from examples.re2tal.config import Config


def pretrain(config: Config, device: str = "auto") -> tuple[Path, float]:
    """Fine-tune; returns the file of the backbone's weights, and the accuracy on the evaluated subset's actions."""
    if config.memory.strategy == "frozen":
        raise Re2TALError("memory.strategy=frozen leaves nothing to fine-tune; choose rewired")
    config = settings_of(config)
    path = config.output / "backbone.safetensors"
    with joined(device) as world:
        trainer = Trainer(config, world, SegmentClassifier)
        with Log(config.output, enabled=world.is_first, step=trainer.step, total=trainer.total) as log:
            trainer.fit(log)
        accuracy = accuracy_of(trainer)
        averaged = trainer.average.applied() if trainer.average is not None else nullcontext()
        with averaged, gathered_weights(trainer.model):
            weights = {name: t.detach().cpu().contiguous() for name, t in trainer.backbone_weights().items()}
        if world.is_first:
            settings = trainer.config
            about = note(settings.backbone.options, rewired=settings.memory.strategy == "rewired")
            save_file(weights, path, metadata=about)
        world.wait()
    return path, accuracy


def settings_of(config: Config) -> Config:
    """The settings of this step: those of the experiment, in a folder of its own."""
    optim = config.optim.model_copy(
        update={
            "epochs": config.pretrain_epochs,
            "cosine": None,
            "warmup": min(config.optim.warmup, config.pretrain_epochs / 4),
        }
    )
    changed = {
        "output": config.output / "pretrain",
        "optim": optim,
        "data": config.data.model_copy(update={"class_agnostic": False}),
        "evaluation": config.evaluation.model_copy(update={"video_classes": None, "every": 0}),
    }
    return config.model_copy(update=changed)


@torch.inference_mode()
def accuracy_of(trainer: Trainer) -> float:
    """How many of the evaluated subset's actions the classifier names rightly."""
    config, world = trainer.config, trainer.world
    clips = trainer.held_out
    items = world.share(range(len(clips)))
    loader = DataLoader(
        torch.utils.data.Subset(clips, items),
        config.evaluation.batch,
        collate_fn=collate,
        num_workers=config.loader.workers,
    )
    dtype, head = AMP[config.optim.amp], trainer.detector.head
    right, total = 0, 0
    averaged = trainer.average.applied() if trainer.average is not None else nullcontext()
    trainer.model.eval()
    with averaged, gathered_weights(trainer.model):
        for batch in loader:
            if not len(batch) or not any(len(labels) for labels in batch.labels):
                continue
            with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                features = trainer.model(batch.frames.to(world.device), batch.mask.to(world.device))
            logits = head.logits(features, [segments.to(world.device) for segments in batch.segments])
            right += int((logits.argmax(dim=1).cpu() == torch.cat(batch.labels)).sum())
            total += len(logits)
    counts = world.gathered((right, total))
    return sum(r for r, _ in counts) / max(1, sum(n for _, n in counts))
