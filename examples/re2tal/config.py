"""One experiment, one YAML file; `examples.re2tal.sections` has its settings. A key that nobody knows is an error."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from examples.re2tal.errors import Re2TALError
from examples.re2tal.recipes import with_recipe
from examples.re2tal.sections import (
    Backbone,
    Clip,
    Data,
    Evaluating,
    Head,
    Loader,
    Memory,
    Optim,
    Section,
    Whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent / "configs"


class ConfigError(Re2TALError):
    """A setting is not as it must be; the message names it."""


class Config(Section):
    """An experiment."""

    output: Path
    """Folder of everything that the run writes."""
    data: Data
    clip: Clip
    backbone: Backbone
    detector: Whole = Whole()
    recipe: Literal["revwire", "opentad"] = "revwire"
    """Whose defaults hold for what is not set, see `examples.re2tal.recipes`."""
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

    @model_validator(mode="before")
    @classmethod
    def _with_recipe(cls, settings: Any) -> Any:
        return with_recipe(settings) if isinstance(settings, dict) else settings

    @model_validator(mode="after")
    def _sound(self) -> Config:
        if self.clip.frames % self.clip.positions:
            raise ValueError(f"clip.frames ({self.clip.frames}) is no multiple of clip.positions")
        if self.optim.warmup >= self.optim.epochs:
            raise ValueError(
                f"optim.warmup ({self.optim.warmup:g}) leaves nothing of {self.optim.epochs} epochs"
            )
        if self.optim.cosine is not None and self.optim.cosine < self.optim.epochs:
            raise ValueError(
                f"optim.cosine ({self.optim.cosine}) is shorter than {self.optim.epochs} optim.epochs"
            )
        if self.clip.fit == "crop" and (side := self.clip.augment.short_side) and side < max(self.clip.size):
            raise ValueError(f"clip.augment.short_side ({side}) is smaller than clip.size {self.clip.size}")
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
