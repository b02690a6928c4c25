"""Layouts of Video Swin: torchvision's (ours), mmaction2's, and that of Re2TAL's rewired networks in OpenTAD."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from examples.re2tal.weights.layouts import Layout, Origin
from examples.re2tal.weights.mmlab import OTHERS, PREFIXES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_NORMS = ("norm3", "norm2", "norm1", "norm0", "norm")
"""What the last norm is called: by the index of the last stage, or, in Video Swin's own repository, by none."""


def _own(name: str) -> Origin:
    is_index = name.endswith("relative_position_index")
    return Origin(name, optional=is_index, computed=is_index)


def _mmaction2(name: str, *, norm: str, rewired: bool) -> Origin:
    """`features.(2i)` are the blocks of stage i, `features.(2i + 1)` is the patch merging after it."""
    kind, _, rest = name.partition(".")
    if kind == "norm":
        return Origin(f"{norm}.{rest}")
    if kind != "features":
        return Origin(name)
    at, _, rest = rest.partition(".")
    stage, is_merging = divmod(int(at), 2)
    if is_merging:
        return Origin(f"layers.{stage}.downsample.{rest}")
    block, _, rest = rest.partition(".")
    rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
    if rewired:  # Fm is the attention's half of a block, Gm the MLP's
        rest = f"inv_block.{'Fm' if rest.startswith(('norm1.', 'attn.')) else 'Gm'}.{rest}"
    is_index = rest.endswith("relative_position_index")
    return Origin(f"layers.{stage}.blocks.{block}.{rest}", optional=is_index, computed=is_index)


def _layouts_of_mmaction2() -> list[Layout]:
    found = []
    for rewired in (False, True):
        for norm in _NORMS:
            origin = partial(_mmaction2, norm=norm, rewired=rewired)
            marks = tuple(origin(name).name for name in ("features.0.0.attn.qkv.weight", "norm.weight"))
            name = "Video Swin, rewired by Re2TAL" if rewired else "Video Swin of mmaction2"
            found.append(Layout(name, marks, origin, PREFIXES, OTHERS, rewired))
    return found


LAYOUTS = (
    *_layouts_of_mmaction2(),
    Layout(
        "Video Swin by torchvision's names",
        ("features.0.0.attn.qkv.weight", "norm.weight"),
        _own,
        ("backbone.", ""),
        ("head.",),
    ),
)


def sizes(get: Callable[[str], Tensor | None]) -> dict[str, Any]:
    """Arguments of the network that a file is of.

    Args:
        get: The file's tensors by the names that they have in our network.
    """
    patch = get("patch_embed.proj.weight")
    tables: list[Tensor] = []
    depths: list[int] = []
    while (table := get(f"features.{2 * len(depths)}.0.attn.relative_position_bias_table")) is not None:
        tables.append(table)
        stage, depth = 2 * len(depths), 1
        while get(f"features.{stage}.{depth}.norm1.weight") is not None:
            depth += 1
        depths.append(depth)
    assert patch is not None
    return {
        "embed_dim": patch.shape[0],
        "patch_size": list(patch.shape[2:]),
        "depths": depths,
        "num_heads": [table.shape[1] for table in tables],
        "window_size": _window(get("features.0.0.attn.relative_position_index"), tables[0].shape[0]),
    }


def _window(index: Tensor | None, offsets: int) -> list[int]:
    """Time, height and width of the windows.

    The index of a pair of points makes equal steps along the width, and from line to line along the height. A file that
    leaves it out has one entry for each offset, (2 time - 1)(2 height - 1)(2 width - 1), of windows as high as they are
    wide.
    """
    if index is None:
        side = max(n for n in range(1, 65) if offsets % (2 * n - 1) ** 2 == 0)
        return [(offsets // (2 * side - 1) ** 2 + 1) // 2, side, side]
    row = index[-1].tolist()[::-1]  # how far each point is from the last one
    steps = [after - before for before, after in pairwise(row)]
    width = _run(steps)
    height = _run(steps[width - 1 :: width])
    return [len(row) // (width * height), height, width]


def _run(steps: list[int]) -> int:
    """Points in the first line of them, which equal steps lie between."""
    return 1 + sum(1 for _ in takewhile(lambda step: step == steps[0], steps))
