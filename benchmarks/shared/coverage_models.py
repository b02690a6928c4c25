"""The models that the coverage sweep goes through: all of timm and torchvision, and a list of transformers' models.

Each is built twice: as an outline on the meta device, at its own size, to plan it and count its bytes; and for real at
the smallest input that leaves its plan as it is, to verify it. Where even the smallest of a family has more than 100
million parameters, it is verified with fewer of its blocks, which are alike.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from benchmarks.shared.small_transformers import ZOO
from revwire.errors import RevwireError
from revwire.libraries import Architecture, timm_models

Build = Callable[[], tuple[nn.Module, Any]]
"""Makes a model and what it is called with."""

BATCH = 8
"""Images of the step whose bytes are counted."""

# what makes training random, switched on where a model knows it
_REGULARISED = ("drop_path_rate", "drop_rate", "attn_drop_rate", "proj_drop_rate")
_LARGE = 100_000_000
"""Parameters from which on a model of equal blocks is verified with fewer of them: in float64 it would not fit."""

FEWER_BLOCKS = 4
_SIDES = (64, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        source: The library it comes from.
        family: What it shares its blocks with: timm's or torchvision's module.
        name: The library's name of it.
        outline: The model on the meta device, at its own input size.
        small: Ways to build it for real, the smallest input first; those that do not work raise. Called with whether
            to switch on drop path and dropout.
    """

    source: str
    family: str
    name: str
    outline: Build
    small: tuple[Callable[[bool], tuple[nn.Module, Any]], ...]

    @property
    def key(self) -> str:
        """`timm/resnet50`."""
        return f"{self.source}/{self.name}"


def timm_entries() -> Iterator[Entry]:
    """Every architecture of `timm.list_models()`."""
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            small = tuple(partial(_small_timm, name, side) for side in (*_SIDES, None))
            yield Entry("timm", module, name, partial(_timm_outline, name), small)


@functools.cache
def fewer_blocks(source: str, name: str) -> dict[str, int]:
    """The argument that makes a large model shallow enough to verify; empty for all others."""
    if source != "timm":
        return {}
    model = Architecture(name).outline()
    large = sum(p.numel() for p in model.parameters()) > _LARGE
    return {"depth": FEWER_BLOCKS} if large and "depth" in inspect.signature(type(model)).parameters else {}


def _timm_outline(name: str) -> tuple[nn.Module, Any]:
    model = Architecture(name).outline()
    return model, timm_models.example_inputs(model, BATCH)


def _small_timm(name: str, side: int | None, regularised: bool) -> tuple[nn.Module, Any]:
    sized = fewer_blocks("timm", name)
    try:
        sized = sized if side is None else {**sized, "img_size": side}
        model = Architecture(name, sized).build()
    except RevwireError:
        sized = fewer_blocks("timm", name)  # convolutional nets take any size and no argument for it
        model = Architecture(name, sized).build()
    if regularised:
        model = _regularised(lambda **more: Architecture(name, {**sized, **more}).build())
    inputs = timm_models.example_inputs(model)
    if side is not None and inputs is not None:
        inputs = torch.randn(2, inputs.shape[1], side, side)
    return model, inputs


def _regularised(build: Callable[..., nn.Module]) -> nn.Module:
    """A model with drop path and dropout on, as far as it takes them."""
    taken: dict[str, float] = {}
    model = build()
    for argument in _REGULARISED:
        try:
            model = build(**taken, **{argument: 0.1})
        except (RevwireError, TypeError, AssertionError):
            continue
        taken[argument] = 0.1
    if any(isinstance(m, nn.Dropout) and m.inplace for m in model.modules()) and "attn_drop_rate" in taken:
        # dropout in place on a softmax's output: plain autograd refuses it too (tnt)
        model = build(**{**taken, "attn_drop_rate": 0.0})
    return model


_VIDEO = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}
_DETECTORS = ("fasterrcnn", "maskrcnn", "retinanet", "keypointrcnn", "fcos", "ssd")


def torchvision_entries() -> Iterator[Entry]:
    """Every architecture of `torchvision.models.list_models()`, of detectors the backbone; none that is quantised."""
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        family = inspect.getmodule(builder).__name__.removeprefix("torchvision.models.")
        if family.startswith("quantization") or family == "optical_flow.raft":
            continue
        if family.startswith("video"):
            frames, side = _VIDEO.get(name, (8, 64))
            own = (16, 224)
            sizes = ((frames, side), own)
        else:
            own = (320,) if "ssd" in name else (224,)
            sizes = tuple((side,) for side in _SIDES)
        if family.startswith(("video", "detection", "segmentation")):
            family = name  # the same backbone reads differently in each: every one is verified
        small = tuple(partial(_small_torchvision, name, size) for size in sizes)
        yield Entry("torchvision", family, name, partial(_torchvision_outline, name, own), small)


def _torchvision(name: str, **more: Any) -> nn.Module:
    weights = {"weights": None}
    if any(part in name for part in (*_DETECTORS, "deeplab", "fcn", "lraspp")):
        weights["weights_backbone"] = None
    if "googlenet" in name or "inception" in name:
        more |= {"init_weights": False, "aux_logits": False}
    model = torchvision.models.get_model(name, **weights, **more)
    return model.backbone if any(part in name for part in _DETECTORS) else model


def _torchvision_outline(name: str, size: tuple[int, ...]) -> tuple[nn.Module, Any]:
    try:
        with torch.device("meta"):
            model = _torchvision(name)
    except NotImplementedError:  # it looks at numbers while it is built
        model = _torchvision(name).to("meta")
    return model, _clip(BATCH, size).to("meta")


def _small_torchvision(name: str, size: tuple[int, ...], regularised: bool) -> tuple[nn.Module, Any]:
    taken: dict[str, float] = {}
    for argument in ("stochastic_depth_prob", "dropout") if regularised else ():
        try:
            _torchvision(name, **taken, **{argument: 0.1})
        except TypeError:
            continue
        taken[argument] = 0.1
    more: dict[str, Any] = dict(taken)
    if name.startswith("vit_"):
        more["image_size"] = size[0] // 16 * 16 if "16" in name else size[0] // 32 * 32
    return _torchvision(name, **more), _clip(2 if name not in _VIDEO else 1, size)


def _clip(batch: int, size: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(batch, 3, *size[:-1], size[-1], size[-1])


def transformers_entries() -> Iterator[Entry]:
    """The models of `benchmarks.shared.small_transformers`, at the one small size they have."""
    for name, (build, inputs, _) in ZOO.items():

        def outline(build: Any = build, inputs: Any = inputs) -> tuple[nn.Module, Any]:
            return build(), inputs(BATCH)

        def small(_: bool, build: Any = build, inputs: Any = inputs) -> tuple[nn.Module, Any]:
            return build(), inputs(2)

        yield Entry("transformers", name, name, outline, (small,))


def entries(sources: tuple[str, ...]) -> Iterator[Entry]:
    """The entries of some of the `SOURCES`, in their order."""
    for source in sources:
        yield from SOURCES[source]()


@functools.cache
def by_key() -> dict[str, Entry]:
    """All of them, by `Entry.key`."""
    return {entry.key: entry for entry in entries(tuple(SOURCES))}


SOURCES: dict[str, Callable[[], Iterator[Entry]]] = {
    "timm": timm_entries,
    "torchvision": torchvision_entries,
    "transformers": transformers_entries,
}
