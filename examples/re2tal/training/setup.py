"""From an experiment's settings to what it needs: data set, clips, model; and the model of a run that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.re2tal.backbones.build import build_backbone, family_of, is_file
from examples.re2tal.config import Config, read_config
from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.data.dataset import Clips
from examples.re2tal.detector import Detector
from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.build import build_head
from examples.re2tal.training.checkpoints import trained_weights
from examples.re2tal.training.strategy import lay_out
from examples.re2tal.weights.families import HEADS, found_in, load_head
from examples.re2tal.weights.layouts import find
from revwire.libraries.drop import is_drop_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from examples.re2tal.backbones.base import Backbone
    from examples.re2tal.data.annotations import Annotations
    from examples.re2tal.heads.base import Head


def annotations_of(config: Config) -> Annotations:
    """The data set.

    Raises:
        Re2TALError: its file is not there, or not as it must be.
    """
    if not config.data.annotations.is_file():
        raise Re2TALError(
            f"there is no file {config.data.annotations}; give data.annotations=FILE and data.videos=FOLDER, or make "
            "the synthetic set: python -m examples.re2tal.synth data/synthetic"
        )
    return read_annotations(config.data.annotations, classes=config.data.classes, blocked=config.data.blocked)


def clips_of(config: Config, annotations: Annotations, *, training: bool) -> Clips:
    """The clips to train on, or to evaluate."""
    data = config.data
    return Clips(
        annotations,
        data.train if training else data.evaluate,
        data.videos,
        training=training,
        seed=config.seed,
        class_agnostic=data.class_agnostic,
        shortest=data.shortest,
        missing_ok=data.missing_ok,
        decoder=data.decoder,
        **config.clip.arguments(),
    )


def resolved(config: Config) -> Config:
    """The settings, with what a file of weights decides among the options: the backbone's wiring, the head's dialect.

    A run that goes on when its file is gone keeps what it once was resolved to.

    Raises:
        Re2TALError: the weights are of a rewired network and memory.strategy leaves it as it was, or the file cannot be
            read.
    """
    given, run = _weights_of(config), config.output / "config.yaml"
    if not is_file(given):
        return config
    path, backbone = Path(str(given)), config.backbone
    if not path.exists() and run.exists():
        before = read_config(run)
        decided, of_head = before.backbone.options, before.head.options
    else:
        _, found = found_in(path, family_of(backbone.name))
        decided = found.options
        head = find(found.stored, HEADS) if config.detector.weights is not None else None
        of_head = {} if head is None else head.options
        if found.layout.rewired and config.memory.strategy != "rewired":
            raise Re2TALError(
                f"{path} holds weights of a rewired network, which is another function under "
                f"memory.strategy={config.memory.strategy}; give memory.strategy=rewired"
            )
    changed = backbone.model_copy(update={"options": {**decided, **backbone.options}})
    speaking = config.head.model_copy(update={"options": {**of_head, **config.head.options}})
    return config.model_copy(update={"backbone": changed, "head": speaking})


def backbone_of(config: Config, *, weights: bool = True) -> Backbone:
    """The backbone as it is built, with its pretrained weights if they are wanted.

    Raises:
        Re2TALError: it is not as `build_backbone` needs it, or `backbone.drop_path` is set and it has none.
    """
    name, given = config.backbone.name, _weights_of(config) if weights else None
    backbone = build_backbone(name, weights=given, **config.backbone.options)
    if (rate := config.backbone.drop_path) is not None:
        paths = [module for module in backbone.modules() if is_drop_path(module)]
        if not paths:
            raise Re2TALError(f"the backbone {name} has no drop path; leave backbone.drop_path out")
        for i, path in enumerate(paths):
            # torchvision's name of the rate, and everybody else's
            setattr(path, "p" if hasattr(path, "p") else "drop_prob", rate * i / max(1, len(paths) - 1))
    return backbone


def detector_of(
    config: Config, classes: int, *, weights: bool = True, head: Callable[[int, int], Any] | None = None
) -> Detector:
    """The model, its backbone laid out as `config.memory` says.

    Args:
        config: The experiment.
        classes: How many the data set has.
        weights: Load the backbone's pretrained weights, or those of a whole detector; not needed where a checkpoint is
            loaded.
        head: Makes another head than `config.head` from the numbers of channels and classes.
    """
    torch.manual_seed(config.seed)
    backbone = backbone_of(config, weights=weights)
    classes = 1 if config.data.class_agnostic else classes
    made = head(backbone.channels, classes) if head is not None else _head(config, backbone.channels, classes)
    if weights and head is None and config.detector.weights is not None:
        load_head(made, config.detector.weights)
    mean, std = backbone.mean, backbone.std
    example = torch.randn(config.optim.batch, 3, config.clip.frames, *config.clip.size)
    laid_out = lay_out(backbone, example, strategy=config.memory.strategy, **config.memory.dials())
    return Detector(
        laid_out,
        made,
        positions=config.clip.positions,
        mean=mean,
        std=std,
        freeze_batch_norm=config.backbone.freeze_batch_norm,
        freeze_norms=config.backbone.freeze_norms,
    )


def trained(run: Path) -> tuple[Config, tuple[str, ...], Detector]:
    """The settings, classes and model of a run, with its averaged weights.

    Raises:
        Re2TALError: the folder holds none.
    """
    weights, config = trained_weights(run), read_config(run / "config.yaml")
    classes = annotations_of(config).classes
    detector = detector_of(config, len(classes), weights=False)
    detector.load_state_dict(weights)
    return config, classes, detector


def _head(config: Config, channels: int, classes: int) -> Head:
    return build_head(config.head.name, in_channels=channels, classes=classes, **config.head.options)


def _weights_of(config: Config) -> str | Path | None:
    return config.detector.weights or config.backbone.weights
