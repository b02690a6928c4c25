"""Layouts of VideoMAE: transformers' (ours), mmaction2's and OpenTAD's, and that of its own repository."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from examples.re2tal.weights.layouts import Layout, Origin
from examples.re2tal.weights.mmlab import OTHERS, PREFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

_PATCHES, _TABLE = "embeddings.patch_embeddings.projection", "embeddings.position_embeddings"
_FRAMES = 16
_PARTS = ("query", "key", "value")
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
}


def _transformers(name: str, *, prefix: str, q_bias: bool) -> Origin:
    """`query.bias` was `q_bias` before transformers 5."""
    name = prefix + name.removeprefix("model.")
    if q_bias and name.endswith((".query.bias", ".value.bias")):
        before, which, _ = name.rsplit(".", 2)
        name = f"{before}.{which[0]}_bias"
    is_table = name.endswith(_TABLE)
    return Origin(name, optional=is_table, computed=is_table)


def _timm(name: str, *, patches: str, mlp: tuple[str, str]) -> Origin:
    """Names as in timm's vision transformers; query, key and value are one tensor."""
    name = name.removeprefix("model.")
    if name == _TABLE:
        return Origin("pos_embed", optional=True, computed=True)
    if name.startswith(_PATCHES):
        return Origin(patches + name.removeprefix(_PATCHES))
    if not name.startswith("encoder.layer."):
        return Origin(name.replace("layernorm.", "norm."))
    block, _, rest = name.removeprefix("encoder.layer.").partition(".")
    layer, _, tensor = rest.rpartition(".")
    which = layer.rpartition(".")[2]
    if which in _PARTS:
        if tensor == "bias":
            return Origin(f"blocks.{block}.attn.{which[0]}_bias")
        return Origin(f"blocks.{block}.attn.qkv.weight", part=(_PARTS.index(which), 3))
    theirs = {**_IN_BLOCK, "intermediate.dense": mlp[0], "output.dense": mlp[1]}[layer]
    return Origin(f"blocks.{block}.{theirs}.{tensor}")


def _options(tensors: Mapping[str, Tensor], *, norm: str, patches: str, table: str) -> dict[str, Any]:
    """Whether there is a norm after the last block, and which pictures the table of positions is for."""
    options: dict[str, Any] = {"use_mean_pooling": f"{norm}.weight" not in tensors}
    if table in tensors:
        _, _, tubelet, side, _ = tensors[f"{patches}.weight"].shape
        positions = tensors[table].shape[1]
        options["trained_size"] = side * math.isqrt(positions // (_FRAMES // tubelet))
    return options


def _of_timm(name: str, patches: str, mlp: tuple[str, str]) -> Layout:
    marks = (f"{patches}.weight", "blocks.0.attn.qkv.weight", f"blocks.0.{mlp[0]}.weight")
    # `fc_norm` and `head` are the classifier's
    others = (*OTHERS, *(prefix + other for prefix in PREFIXES for other in ("fc_norm.", "head.")))
    options = partial(_options, norm="norm", patches=patches, table="pos_embed")
    return Layout(name, marks, partial(_timm, patches=patches, mlp=mlp), PREFIXES, others, options=options)


def _of_transformers(prefix: str, *, q_bias: bool) -> Layout:
    origin = partial(_transformers, prefix=prefix, q_bias=q_bias)
    bias = "encoder.layer.0.attention.attention.query.bias"
    marks = tuple(origin(name).name for name in (f"{_PATCHES}.weight", bias))
    options = partial(_options, norm=f"{prefix}layernorm", patches=prefix + _PATCHES, table=prefix + _TABLE)
    return Layout(
        "VideoMAE by transformers' names",
        marks,
        origin,
        ("backbone.", "") if prefix == "model." else ("",),
        ("head.", "fc_norm.", "classifier."),
        options=options,
    )


LAYOUTS = (
    _of_timm("VideoMAE of mmaction2", "patch_embed.projection", ("mlp.layers.0.0", "mlp.layers.1")),
    _of_timm("VideoMAE of its own repository", "patch_embed.proj", ("mlp.fc1", "mlp.fc2")),
    *[
        _of_transformers(prefix, q_bias=q_bias)
        for prefix in ("model.", "videomae.", "")
        for q_bias in (False, True)
    ],
)


def sizes(get: Callable[[str], Tensor | None]) -> dict[str, Any]:
    """Arguments of the network that a file is of; no tensor tells how many heads, which are taken to be of 64 channels.

    Args:
        get: The file's tensors by the names that they have in our network.
    """
    block = "model.encoder.layer.{}.intermediate.dense.weight"
    first, patches = get(block.format(0)), get(f"model.{_PATCHES}.weight")
    assert first is not None
    assert patches is not None
    inner, width = first.shape
    return {
        "hidden_size": width,
        "num_attention_heads": next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0),
        "num_hidden_layers": next(n for n in range(1000) if get(block.format(n)) is None),
        "intermediate_size": inner,
        "tubelet_size": patches.shape[2],
        "patch_size": patches.shape[3],
    }
