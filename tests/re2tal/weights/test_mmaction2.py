"""Features of mmaction2's own networks, from files of its layout; `reference/mmaction2.json` says what made them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.weights.families import found_in
from examples.re2tal.weights.layouts import load
from tests.re2tal.reference.formula import clip, fill
from tests.re2tal.weights.made import SWIN, VIDEOMAE, renamed, slowfast_rules, swin_rules, videomae_file

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "mmaction2.json").read_text())
CASES = {
    "slowfast": (("slowfast_r50", {"base": 8, "fast": 1, "wiring": "mmaction2"}), (8, 32, 32)),
    "video_swin": (SWIN, (10, 36, 28)),
    "videomae": (VIDEOMAE, (16, 32, 32)),
    "videomae, other size": (VIDEOMAE, (16, 48, 64)),
}
THEIRS = {
    "slowfast": lambda backbone: renamed(backbone.state_dict(), slowfast_rules()),
    "video_swin": lambda backbone: renamed(backbone.state_dict(), swin_rules()),
    "videomae": videomae_file,
}


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_mmaction2(case, tmp_path):
    (name, options), shape = CASES[case]
    backbone = build_backbone(name, **options).double().eval()
    tensors = {key: t.clone() for key, t in THEIRS[case.partition(",")[0]](backbone).items()}
    fill(tensors)
    path = tmp_path / "weights.safetensors"
    save_file({f"backbone.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
    load(backbone, found_in(path)[1], "the backbone")
    with torch.no_grad():
        features = backbone(clip(*shape))
    features = features if isinstance(features, tuple) else (features,)
    for found, wanted in zip(features, REFERENCE[case], strict=True):
        torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
