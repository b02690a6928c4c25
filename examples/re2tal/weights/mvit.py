"""Layouts of MViT: torchvision's, and ours, which keeps the network without its head under `tokens`."""

from __future__ import annotations

from examples.re2tal.weights.layouts import Layout, Origin


def _torchvision(name: str) -> Origin:
    return Origin(name.removeprefix("tokens."))


def _own(name: str) -> Origin:
    return Origin(name)


LAYOUTS = (
    Layout(
        "MViT of torchvision",
        ("conv_proj.weight", "blocks.0.norm1.weight"),
        _torchvision,
        others=("head.",),
    ),
    Layout(
        "MViT of this example",
        ("tokens.conv_proj.weight", "tokens.blocks.0.norm1.weight"),
        _own,
        ("backbone.", ""),
        ("head.",),
    ),
)
