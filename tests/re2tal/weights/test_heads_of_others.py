"""The head of ActionFormer under OpenTAD's names and under its own, renamed here by rules from their side."""

import re

import pytest
import torch
from safetensors.torch import save_file

from examples.re2tal.heads.build import build_head
from examples.re2tal.weights import actionformer
from examples.re2tal.weights.families import head_in
from examples.re2tal.weights.layouts import fitted, written

SIZES = {"in_channels": 6, "classes": 3, "channels": 8, "levels": 4, "stem": 1}
IN_BLOCK = [
    (r"norms\.0", "ln1"),
    (r"norms\.1", "ln2"),
    (r"mlp\.2", "mlp.3"),
    (r"scales\.0", "drop_path_attn.scale"),
    (r"scales\.1", "drop_path_mlp.scale"),
    (r"attention\.outward", "attn.proj"),
    *[
        (rf"attention\.{ours}\.{i}", f"attn.{part}{theirs}")
        for i, part in enumerate(("query", "key", "value"))
        for ours, theirs in (("before", "_conv"), ("norms", "_norm"), ("inward", ""))
    ],
]
BESIDE_BLOCKS = {
    "OpenTAD": [
        (r"pyramid\.projection\.convs\.(\d)", r"projection.embed.\1"),
        (r"pyramid\.projection\.norms\.(\d)", r"projection.embed.\1.norm"),
        (r"classify\.body\.convs\.(\d)", r"rpn_head.cls_convs.\1"),
        (r"classify\.body\.norms\.(\d)", r"rpn_head.cls_convs.\1.norm"),
        (r"classify\.last\.conv", "rpn_head.cls_head"),
        (r"regress\.body\.convs\.(\d)", r"rpn_head.reg_convs.\1"),
        (r"regress\.body\.norms\.(\d)", r"rpn_head.reg_convs.\1.norm"),
        (r"regress\.last\.conv", "rpn_head.reg_head"),
        (r"normalizer", "rpn_head.loss_normalizer"),
    ],
    "ActionFormer": [
        (r"pyramid\.projection\.convs\.(\d)", r"backbone.embd.\1"),
        (r"pyramid\.projection\.norms\.", "backbone.embd_norm."),
        (r"classify\.body\.convs\.", "cls_head.head."),
        (r"classify\.body\.norms\.", "cls_head.norm."),
        (r"classify\.last\.", "cls_head.cls_head."),
        (r"regress\.body\.convs\.", "reg_head.head."),
        (r"regress\.body\.norms\.", "reg_head.norm."),
        (r"regress\.last\.", "reg_head.offset_head."),
    ],
}
BLOCKS = {"OpenTAD": "projection", "ActionFormer": "backbone"}
SCALES = {"OpenTAD": "rpn_head", "ActionFormer": "reg_head"}


def by(rules, name):
    for pattern, new in rules:
        renamed, done = re.subn(f"^{pattern}", new, name)
        if done:
            return renamed
    return name


def renamed(head, whose):
    """The head's tensors in a file of theirs."""
    tensors = dict(head.state_dict())
    out = {f"{SCALES[whose]}.scale.{i}.scale": scale for i, scale in enumerate(tensors.pop("scales"))}
    if whose == "ActionFormer":
        del tensors["normalizer"]
    for name, tensor in tensors.items():
        block = re.match(r"pyramid\.(stem|down)\.(\d+)\.(.*)", name)
        if block:
            part = {"stem": "stem", "down": "branch"}[block[1]]
            new = f"{BLOCKS[whose]}.{part}.{block[2]}.{by(IN_BLOCK, block[3])}"
        else:
            new = by(BESIDE_BLOCKS[whose], name.replace("pyramid.norms.", "neck.fpn_norms."))
        is_norm = any(word in new for word in ("norm.", "norms.", "_norm", ".ln"))
        shape = (
            (1, -1, 1) if new.endswith(".scale") or (whose == "ActionFormer" and is_norm) else tensor.shape
        )
        out[new] = tensor.reshape(shape)
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize("whose", BLOCKS)
def test_heads_are_read_and_written_by_their_names(whose, tmp_path):
    head = build_head("actionformer", heads=2, **SIZES)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    path, tensors = tmp_path / "head.safetensors", renamed(head, whose)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    found = head_in(path)
    assert found is not None
    assert actionformer.sizes(found.get) == {**SIZES, "depth": 2}
    fresh = build_head("actionformer", heads=2, **SIZES)
    taken = fitted(found, fresh.state_dict(), "the head")
    assert set(fresh.state_dict()) - set(taken) == ({"normalizer"} if whose == "ActionFormer" else set())
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in taken.items())
    back = written(found, taken)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_file_without_a_head_has_none(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert head_in(tmp_path / "a.safetensors") is None
