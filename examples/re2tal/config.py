"""One experiment, one YAML file: every setting, its default and what it means. A key that nobody knows is an error."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "configs"


class ConfigError(Re2TALError):
    """A setting is not as it must be; the message names it."""


class Section(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(Section):
    """The data set."""

    annotations: Path
    """The annotation file, in any dialect of `examples.re2tal.data.annotations`."""
    videos: Path
    """Folder of the video files."""
    classes: Path | None = None
    """Class names, one a line; the annotation file's own order if not given."""
    blocked: Path | None = None
    """JSON list of ids to leave out."""
    train: str = "training"
    """Subset to train on."""
    evaluate: str = "validation"
    """Subset to evaluate on."""
    class_agnostic: bool = False
    """Tell only action from background; `evaluation.video_classes` then says which action it is."""
    missing_ok: bool = False
    """Go on without the videos whose files are missing."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes the videos."""


class Augment(Section):
    """What training changes about the pictures."""

    crop: float = Field(1.0, gt=0, le=1)
    """Least part of the picture that is shown."""
    flip: bool = False
    """Mirror half of the clips."""
    jitter: float = Field(0.0, ge=0, le=1)
    """By which part brightness, contrast and saturation change at most."""


class Clip(Section):
    """What the model sees of a video."""

    sampling: Literal["resize", "window"] = "window"
    """The whole video, or windows of a fixed rate."""
    frames: int = Field(gt=0)
    """Pictures in a clip."""
    positions: int = Field(gt=0)
    """Positions of the head; `frames` is a multiple of them."""
    size: tuple[int, int]
    """Height and width of the pictures."""
    rate: float = Field(30.0, gt=0)
    """Pictures a second, in windows."""
    overlap: float = Field(0.5, ge=0, lt=1)
    """Of the windows of evaluation."""
    augment: Augment = Augment()


class Backbone(Section):
    """From pictures to features."""

    name: str
    """One of `examples.re2tal.backbones.build.NAMES`."""
    weights: str | None = None
    """What its source calls its pretrained weights, or a file; random weights if not given."""
    freeze_batch_norm: bool = False
    """Leave the statistics and weights of BatchNorm as they are, as Re2TAL does."""
    options: dict[str, Any] = {}
    """Further arguments of the backbone."""


class Whole(Section):
    """Backbone and head together."""

    weights: Path | None = None
    """File of a trained detector, of one of the layouts of `examples.re2tal.weights`, that this run starts from; it
    replaces `backbone.weights`."""


class Memory(Section):
    """How the backbone does its training step; see `revwire.rewire` for the dials."""

    strategy: Literal["plain", "checkpoint", "rewired", "frozen"] = "rewired"
    """With *rewired*, this is Re2TAL."""
    chunks: int | dict[str, int] | None = None
    """Run branches over slices of the batch."""
    anchor: str | None = None
    """Steps that keep their input."""
    transitions: Literal["keep", "checkpoint"] | None = None
    """What the blocks between the chains do."""
    budget: str | None = None
    """A size such as 12GiB that the backbone's step has to fit in; chooses the other dials."""
    exact: bool | None = None
    """Reconstruct bit for bit."""
    compile: bool | None = None
    """Compile the branches."""

    def dials(self) -> dict[str, Any]:
        """Those that were set."""
        return {key: value for key, value in self if key != "strategy" and value is not None}


class Head(Section):
    """From features to predictions."""

    name: str = "actionformer"
    """One of `examples.re2tal.heads.build.NAMES`."""
    options: dict[str, Any] = {}
    """Further arguments of the head."""


class Optim(Section):
    """The optimizer, AdamW, and what it runs on."""

    epochs: int = Field(gt=0)
    """Of training."""
    warmup: float = Field(5, ge=0)
    """Epochs of rising learning rate, from zero; then it falls as a cosine, to zero."""
    batch: int = Field(1, gt=0)
    """Clips that one process runs at once."""
    accumulate: int = Field(1, gt=0)
    """Batches that one step of the optimizer adds up."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of the head."""
    backbone_lr: float = Field(1e-5, gt=0)
    """Learning rate of the backbone."""
    weight_decay: float = Field(0.05, ge=0)
    """Of weights; biases, norms and scales have none."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(0.999, ge=0, lt=1)
    """How slowly the averaged weights follow, which are evaluated; less at first."""
    amp: Literal["none", "bf16", "fp16"] = "bf16"
    """Autocast."""


class Loader(Section):
    """The processes that decode."""

    workers: int = Field(2, ge=0)
    """How many, for each training process."""
    prefetch: int = Field(2, gt=0)
    """Batches that each has ready."""


class Evaluating(Section):
    """From candidates to mAP."""

    tiou: str = "0.3:0.1:0.7"
    """Thresholds, first:step:last or a list with commas."""
    batch: int = Field(1, gt=0)
    """Clips that are run at once."""
    threshold: float = Field(0.001, ge=0)
    """Least score of a candidate."""
    topk: int = Field(2000, gt=0)
    """Most candidates of a clip."""
    sigma: float = Field(0.7, gt=0)
    """Of soft-NMS."""
    limit: int = Field(2000, gt=0)
    """Most detections of a video."""
    voting: float | None = Field(None, gt=0, le=1)
    """Least tIoU of a vote for a boundary, in class-agnostic detection; no voting if not given."""
    video_classes: Path | None = None
    """Scores of whole videos by another network, see `examples.re2tal.evaluation.postprocess`."""
    video_rule: Literal["product", "sqrt"] = "product"
    """How its scores are joined with the detections'."""
    every: int = Field(0, ge=0)
    """Evaluate after so many epochs, too; 0: only at the end."""

    @field_validator("tiou")
    @classmethod
    def _readable(cls, value: str) -> str:
        thresholds(value)
        return value


class Config(Section):
    """An experiment."""

    output: Path
    """Folder of everything that the run writes."""
    data: Data
    clip: Clip
    backbone: Backbone
    detector: Whole = Whole()
    start_from: Path | None = None
    """Output folder of a run whose trained model, backbone and head, this one starts from."""
    memory: Memory = Memory()
    head: Head = Head()
    optim: Optim
    loader: Loader = Loader()
    evaluation: Evaluating = Evaluating()
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What several processes do: each has all weights, or a part of them."""
    seed: int = 0
    """Of weights, order, windows, augmentation and drop path."""
    pretrain_epochs: int = Field(30, gt=0)
    """Epochs of `examples.re2tal.pretrain`."""
    checkpoint_every: int = Field(500, gt=0)
    """Steps between checkpoints; there is one at the end of every epoch, too."""
    keep: int = Field(2, gt=0)
    """How many checkpoints are kept."""

    @model_validator(mode="after")
    def _sound(self) -> Config:
        if self.clip.frames % self.clip.positions:
            raise ValueError(f"clip.frames ({self.clip.frames}) is no multiple of clip.positions")
        if self.optim.warmup >= self.optim.epochs:
            raise ValueError(
                f"optim.warmup ({self.optim.warmup:g}) leaves nothing of {self.optim.epochs} epochs"
            )
        if self.data.class_agnostic != (self.evaluation.video_classes is not None):
            raise ValueError(
                "data.class_agnostic tells actions from background alone and evaluation.video_classes which they are: "
                "set both, or none"
            )
        if self.detector.weights is not None and self.start_from is not None:
            raise ValueError("detector.weights and start_from are two models to start from; give one of them")
        if self.memory.strategy != "rewired" and (dials := self.memory.dials()):
            raise ValueError(
                f"memory.{next(iter(dials))} is a dial of memory.strategy=rewired, which is {self.memory.strategy}; "
                f"leave the file's dials out with 'memory={{strategy: {self.memory.strategy}}}'"
            )
        return self


def read_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        name: A YAML file, or the name of one in `examples/re2tal/configs`.
        overrides: `key.of.the.setting=value`, values as in YAML.

    Raises:
        ConfigError: the file or a setting is not as it must be; the message names all of them.
    """
    path = Path(name)
    if not path.is_file() and (path := FOLDER / f"{name}.yaml") and not path.is_file():
        there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ConfigError(
            f"there is no file {name}, and no shipped configuration of that name; there are {there}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        for override in overrides:
            _override(settings, override)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        faults = "\n".join(f"  {_told(fault)}" for fault in error.errors())
        raise ConfigError(f"{path}:\n{faults}") from None


def thresholds(text: str) -> NDArray[np.float64]:
    """TIoU thresholds from `first:step:last`, the last included, or from a list with commas.

    Raises:
        ValueError: it is neither, or a threshold is not within 0 and 1.
    """
    try:
        if ":" in text:
            first, step, last = (float(part) for part in text.split(":"))
            values = np.linspace(first, last, round((last - first) / step) + 1)
            sound = step > 0 and np.allclose(np.diff(values), step)
        else:
            values, sound = np.array([float(part) for part in text.split(",")]), True
    except (ValueError, ZeroDivisionError):
        sound = False
    if not sound or not len(values) or not np.all((values > 0) & (values <= 1)):
        raise ValueError(f"{text!r} are no thresholds; write 0.5:0.05:0.95 or 0.3,0.5,0.7")
    return values


def _override(settings: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r} is not key=value")
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {}) if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: there are no settings below {'.'.join(parents)}")
    settings[last] = yaml.safe_load(value)


def _told(fault: Any) -> str:
    """One line on one fault, with the setting that may have been meant."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}" if where else fault["msg"].removeprefix("Value error, ")
    section: Any = Config
    for part in fault["loc"][:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(str(fault["loc"][-1]), section.model_fields, n=1)
    there = f"did you mean {near[0]}?" if near else f"there are {', '.join(section.model_fields)}"
    return f"{where}: there is no such setting; {there}"
