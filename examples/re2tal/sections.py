"""The settings of an experiment, section by section: every one, its default and what it means."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # pydantic reads the annotations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    shortest: float = Field(0.0, ge=0, lt=1)
    """Actions that last less than this part of their video are not trained on."""
    missing_ok: bool = False
    """Go on without the videos whose files are missing."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes the videos."""


class Augment(Section):
    """What training changes about the pictures."""

    crop: float = Field(1.0, gt=0, le=1)
    """Least part of the picture that is shown."""
    short_side: int | None = Field(None, gt=0)
    """What the short side is scaled to before the crop, with `clip.fit` *crop*; that of the size if not given."""
    flip: bool = False
    """Mirror half of the clips."""
    jitter: float = Field(0.0, ge=0, le=1)
    """By which part brightness, contrast and saturation change at most."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """By which part of the colour wheel the hue changes at most."""
    rand_augment: int = Field(0, ge=0)
    """Operations of RandAugment that each clip goes through."""
    magnitude: int = Field(27, ge=0, le=30)
    """How strong those are."""


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
    fit: Literal["squeeze", "crop"] = "squeeze"
    """Pictures of another shape are squeezed, or their short side is scaled and the middle is shown."""
    by: Literal["time", "frame"] = "time"
    """By seconds, which reaches the end of every video at any frame rate; or by numbers of frames, as OpenTAD."""
    rate: float = Field(30.0, gt=0)
    """Pictures a second, in windows by time."""
    stride: int = Field(4, gt=0)
    """Frames of the video from one position to the next, in windows by frame."""
    overlap: float = Field(0.5, ge=0, lt=1)
    """Of the windows of evaluation."""
    augment: Augment = Augment()

    def arguments(self) -> dict[str, Any]:
        """As `examples.re2tal.data.dataset.Clips` takes them."""
        own = {name: value for name, value in self if name != "augment"}
        augment = self.augment.model_dump()
        return {**own, "short_side": augment.pop("short_side"), "augment": augment}


class Backbone(Section):
    """From pictures to features."""

    name: str
    """One of `examples.re2tal.backbones.build.NAMES`."""
    weights: str | None = None
    """What its source calls its pretrained weights, or a file; random weights if not given."""
    freeze_batch_norm: bool = False
    """Leave the statistics and weights of BatchNorm as they are, as Re2TAL does."""
    freeze_norms: bool = False
    """The same of all norms, as OpenTAD does: LayerNorm and GroupNorm, too."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Probability to leave out a residual branch of the last block, rising from 0; the backbone's own if not given."""
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
    """Epochs of rising learning rate; then it falls as a cosine."""
    warmup_from: Literal["step", "zero"] = "step"
    """The first step is one of the rising ones; or at rate zero, and the last of the warm-up at full rate (OpenTAD)."""
    cosine: int | None = Field(None, gt=0)
    """Epochs that the cosine is laid out for, of which `epochs` are run; those if not given."""
    least_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""
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
    decay_backbone: Literal["weights", "all"] = "weights"
    """With *all*, biases and norms of the backbone decay, too (OpenTAD)."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(0.999, ge=0, lt=1)
    """How slowly the averaged weights follow, which are evaluated."""
    ema_warmup: bool = True
    """They follow faster at first; OpenTAD's do not."""
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
    min_score: float = Field(0.001, ge=0)
    """Least score that soft-NMS leaves."""
    topk: int = Field(2000, gt=0)
    """Most candidates of a clip."""
    sigma: float = Field(0.7, gt=0)
    """Of soft-NMS."""
    limit: int = Field(2000, gt=0)
    """Most detections of a video."""
    voting: float | None = Field(None, gt=0, le=1)
    """Least tIoU of a vote for a boundary, in class-agnostic detection; no voting if not given."""
    vote_weight: Literal["score*iou", "score"] = "score*iou"
    """What a vote counts: as ActionFormer, or as OpenTAD."""
    dialect: Literal["revwire", "opentad"] = "revwire"
    """*opentad*: candidates of windows are rounded before soft-NMS, to hundredths of a second and scores to 0.0001;
    those of whole videos are cut to the video after it; what is found is rounded."""
    drop_duplicates: bool = False
    """Count actions that are annotated twice once, and those of no length not at all, as OpenTAD does."""
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
