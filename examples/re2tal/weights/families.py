"""The families of networks that there are layouts of, and which of them a file is of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from examples.re2tal.errors import Re2TALError
from examples.re2tal.weights import actionformer, mvit, slowfast, video_swin, videomae
from examples.re2tal.weights.layouts import Found, Layout, Origin, find, load
from examples.re2tal.weights.reading import read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "video_swin": video_swin.LAYOUTS,
    "slowfast": slowfast.LAYOUTS,
    "videomae": videomae.LAYOUTS,
    "mvit": mvit.LAYOUTS,
}
"""By family, which is the name of the module in `examples.re2tal.backbones`."""

SIZES: dict[str, Callable[[Callable[[str], Tensor | None]], dict[str, Any]]] = {
    "video_swin": video_swin.sizes,
    "slowfast": slowfast.sizes,
    "videomae": videomae.sizes,
    "mvit": lambda _: {},
}
"""By family: arguments of the network that a file is of."""

GUESSED = {"videomae": ("num_attention_heads",)}
"""By family: those of the arguments that no tensor tells."""

HEADS = actionformer.LAYOUTS
"""Of heads, in files of whole detectors."""

_OWN = Layout("weights of this example", (), Origin, ("backbone.", ""), ("head.",))
_NOTE = "re2tal"


def found_in(path: Path, family: str | None = None) -> tuple[str, Found]:
    """The family and the layout that a file of weights is of.

    Args:
        path: The file.
        family: What it has to be; one without layouts of its own has files with our names.

    Raises:
        Re2TALError: it cannot be read, is of another family, or of no known layout.
    """
    stored = read(path)
    for known, layouts in LAYOUTS.items():
        if (found := find(stored, layouts)) is not None:
            if family not in {known, None}:
                raise Re2TALError(
                    f"{path} does not fit the backbone: it holds {found.layout.name}; choose a backbone.name of that"
                )
            return known, _as_noted(found)
    if family is not None and family not in LAYOUTS:
        whole = all(name.startswith(("backbone.", "head.")) for name in stored.tensors)
        return family, _as_noted(Found(stored, _OWN, "backbone." if whole else ""))
    some = ", ".join(list(stored.tensors)[:3])
    of = LAYOUTS[family] if family is not None else [layout for each in LAYOUTS.values() for layout in each]
    raise Re2TALError(
        f"{path} does not fit the backbone: its names ({some}, ...) are of no layout known here: "
        f"{', '.join(dict.fromkeys(layout.name for layout in of))}"
    )


def head_in(path: Path) -> Found | None:
    """The layout of the head that a file of a whole detector holds; None if it holds none that is known here.

    Raises:
        Re2TALError: the file cannot be read.
    """
    return find(read(path), HEADS)


def load_head(head: nn.Module, path: Path) -> None:
    """Take the weights of a file's head, all of them and no others.

    Raises:
        Re2TALError: the file cannot be read, holds no head that is known here, or does not fit.
    """
    found = head_in(path)
    if found is None:
        known = ", ".join(layout.name for layout in HEADS)
        raise Re2TALError(
            f"{path} holds no head that is known here ({known}); load its backbone alone: backbone.weights={path}"
        )
    load(head, found, "the head")


def note(options: Mapping[str, Any], *, rewired: bool) -> dict[str, str]:
    """What a safetensors file with our names says about its weights, which the names do not tell."""
    return {_NOTE: json.dumps({"options": dict(options), "rewired": rewired})}


def _as_noted(found: Found) -> Found:
    """With what our own file notes about itself."""
    if _NOTE not in found.stored.metadata:
        return found
    try:
        noted = json.loads(found.stored.metadata[_NOTE])
        own, rewired = dict(noted["options"]), bool(noted["rewired"])
    except (ValueError, TypeError, KeyError):
        raise Re2TALError(
            f"{found.stored.path} says about itself what nobody can read; write it again: "
            "python -m examples.re2tal.convert FILE, with the file that it was made of"
        ) from None
    layout = found.layout
    changed = replace(layout, rewired=rewired, options=lambda tensors: {**layout.options(tensors), **own})
    return replace(found, layout=changed)
