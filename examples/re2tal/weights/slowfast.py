"""Layouts of SlowFast: pytorchvideo's (ours), mmaction2's, and that of Re2TAL's rewired networks in OpenTAD."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from examples.re2tal.weights.layouts import Layout, Origin
from examples.re2tal.weights.mmlab import OTHERS, PREFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_PATHS = ("slow_path", "fast_path")
_LATERAL = {"conv_fast_to_slow": "conv", "norm": "bn"}
_CONVS = {"conv_a": "conv1.conv", "conv_b": "conv2.conv", "conv_c": "conv3.conv"}
_NORMS = {"norm_a": "conv1.bn", "norm_b": "conv2.bn", "norm_c": "conv3.bn"}
_SKIP = {"branch1_conv": "downsample.conv", "branch1_norm": "downsample.bn"}
_STEM = {"conv": "conv1.conv", "norm": "conv1.bn"}


def _origin(name: str, at: str) -> Origin:
    return Origin(at, optional=name.endswith("num_batches_tracked"))  # files of old versions of torch lack it


def _own(name: str) -> Origin:
    return _origin(name, name)


def _mmaction2(name: str, *, rewired: bool) -> Origin:
    """`blocks.0` are the stems, `blocks.s` is stage s; slow pathway and fast pathway in each."""
    _, stage, rest = name.split(".", 2)
    if rest.startswith("multipathway_fusion."):
        _, layer, tensor = rest.split(".")
        before = "conv1" if stage == "0" else f"layer{stage}"
        return _origin(name, f"slow_path.{before}_lateral.{_LATERAL[layer]}.{tensor}")
    _, pathway, rest = rest.split(".", 2)
    path = _PATHS[int(pathway)]
    if stage == "0":
        layer, tensor = rest.split(".")
        return _origin(name, f"{path}.{_STEM[layer]}.{tensor}")
    _, block, rest = rest.split(".", 2)
    *_, layer, tensor = rest.split(".")
    place = f"{path}.layer{stage}.{f'blocks.{block}' if rewired else block}"
    if layer in _SKIP:
        return _origin(name, f"{place}.{_SKIP[layer]}.{tensor}")
    if rewired:  # a stage's first block is no reversible one
        place += ".Fm" if block == "0" else ".inv_block.Fm"
    return _origin(name, f"{place}.{(_CONVS | _NORMS)[layer]}.{tensor}")


def _wiring(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a file with our names: only pytorchvideo's laterals have norms."""
    has_norm = any("multipathway_fusion.norm" in name for name in tensors)
    return {"wiring": "pytorchvideo" if has_norm else "mmaction2"}


_STEM_CONV, _FIRST_CONV = (
    f"blocks.{at}.weight"
    for at in ("0.multipathway_blocks.0.conv", "1.multipathway_blocks.0.res_blocks.0.branch2.conv_a")
)


def _of_mmlab(name: str, wiring: str, *, rewired: bool) -> Layout:
    origin = partial(_mmaction2, rewired=rewired)
    marks = tuple(origin(ours).name for ours in (_STEM_CONV, _FIRST_CONV))
    return Layout(name, marks, origin, PREFIXES, OTHERS, rewired, lambda _: {"wiring": wiring})


LAYOUTS = (
    _of_mmlab("SlowFast of mmaction2", "mmaction2", rewired=False),
    _of_mmlab("SlowFast, rewired by Re2TAL", "re2tal", rewired=True),
    Layout(
        "SlowFast by pytorchvideo's names",
        (_STEM_CONV, _FIRST_CONV),
        _own,
        ("backbone.", ""),
        ("blocks.5.", "blocks.6.", "head."),  # pooling and the classifier; the head of a detector
        options=_wiring,
    ),
)


def sizes(get: Callable[[str], Tensor | None]) -> dict[str, Any]:
    """Arguments of the network that a file is of.

    Args:
        get: The file's tensors by the names that they have in our network.
    """

    def depth(stage: int) -> int:
        block = f"blocks.{stage}.multipathway_blocks.0.res_blocks.{{}}.branch2.conv_a.weight"
        return next(n for n in range(1000) if get(block.format(n)) is None)

    stems = [get(f"blocks.0.multipathway_blocks.{path}.conv.weight") for path in (0, 1)]
    base, fast = (0 if stem is None else stem.shape[0] for stem in stems)
    return {"depths": [depth(stage) for stage in (1, 2, 3, 4)], "base": base, "fast": fast}
