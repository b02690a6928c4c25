"""SlowFast against pytorchvideo's own numbers, and against a forward that is written out by tensors' names."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import revwire
from examples.re2tal.backbones.base import IMAGENET, at_positions
from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.backbones.slowfast import WIRINGS
from examples.re2tal.errors import Re2TALError
from examples.re2tal.training.strategy import lay_out
from tests.re2tal.reference.formula import clip as formula_clip
from tests.re2tal.reference.formula import fill

REFERENCE = Path(__file__).parents[1] / "reference" / "slowfast_pytorchvideo.json"


def small(wiring="pytorchvideo", **options):
    torch.manual_seed(0)
    backbone = build_backbone("slowfast_r50", base=8, fast=1, wiring=wiring, **options)
    for name, tensor in backbone.state_dict().items():
        if tensor.ndim == 1:  # branches that begin as zero hide mistakes
            low, high = (0.5, 1.0) if name.endswith(("weight", "running_var")) else (-0.3, 0.3)
            torch.nn.init.uniform_(tensor, low, high)
    return backbone.double().eval(), torch.randn(2, 3, 16, 48, 32, dtype=torch.float64)


class Literal:
    """The network as its papers draw it, from its tensors alone."""

    def __init__(self, tensors, wiring, rewired):
        self.tensors, self.wiring, self.rewired = tensors, wiring, rewired

    def norm(self, x, name):
        mean, var, weight, bias = (
            self.tensors[f"{name}.{which}"] for which in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias)

    def conv(self, x, name, stride=(1, 1, 1)):
        weight = self.tensors[f"{name}.weight"]
        return functional.conv3d(x, weight, stride=stride, padding=[n // 2 for n in weight.shape[2:]])

    def branch(self, x, name, stride):
        for which, by in zip("ab", ((1, 1, 1), stride), strict=True):
            x = self.norm(self.conv(x, f"{name}.conv_{which}", by), f"{name}.norm_{which}").relu()
        return self.norm(self.conv(x, f"{name}.conv_c"), f"{name}.norm_c")

    def first(self, x, name, stride):
        skip = self.norm(self.conv(x, f"{name}.branch1_conv", stride), f"{name}.branch1_norm")
        branch = self.branch(x, f"{name}.branch2", stride)
        return skip + branch.relu() if self.wiring == "re2tal" else (skip + branch).relu()

    def stage(self, x, name, stride):
        blocks = {n.split(".")[5] for n in self.tensors if n.startswith(f"{name}.res_blocks.")}
        x = self.first(x, f"{name}.res_blocks.0", stride)
        older = newer = x
        for j in range(1, len(blocks)):
            branch = self.branch(newer, f"{name}.res_blocks.{j}.branch2", (1, 1, 1))
            if self.rewired:
                older, newer = newer, older + branch.relu()
            else:
                newer = (newer + branch).relu()
        return (older + newer) / 2 if self.rewired else newer

    def __call__(self, clip):
        paths = [clip[:, :, ::4], clip]
        for s in range(5):
            for p in (0, 1):
                name = f"blocks.{s}.multipathway_blocks.{p}"
                if s == 0:
                    x = self.norm(self.conv(paths[p], f"{name}.conv", (1, 2, 2)), f"{name}.norm").relu()
                    paths[p] = functional.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
                else:
                    paths[p] = self.stage(paths[p], name, (1, 1, 1) if s == 1 else (1, 2, 2))
            if s < 4:
                lateral = f"blocks.{s}.multipathway_fusion"
                seen = self.conv(paths[1], f"{lateral}.conv_fast_to_slow", (4, 1, 1))
                if self.wiring == "pytorchvideo":
                    seen = self.norm(seen, f"{lateral}.norm").relu()
                paths[0] = torch.cat([paths[0], seen], dim=1)
        return [path.mean(dim=(3, 4)) for path in paths]


def test_the_numbers_are_those_of_pytorchvideo():
    wanted = json.loads(REFERENCE.read_text())
    backbone = build_backbone("slowfast_r50", base=8, fast=1).double().eval()
    fill(backbone.state_dict())
    for features, name in zip(backbone(formula_clip(8, 32, 32)), ("slow", "fast"), strict=True):
        torch.testing.assert_close(
            features[0], torch.tensor(wanted[name], dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("wiring", WIRINGS)
def test_the_forward_of_every_wiring(wiring):
    backbone, clip = small(wiring)
    for features, wanted in zip(
        backbone(clip), Literal(backbone.state_dict(), wiring, False)(clip), strict=True
    ):
        torch.testing.assert_close(features, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_rewired_it_computes_re2tals_recurrence_with_its_gradients(wiring):
    backbone, clip = small(wiring)
    rewired = lay_out(copy.deepcopy(backbone), clip, strategy="rewired").eval()
    parameters = dict(backbone.named_parameters())
    tensors = {**backbone.state_dict(), **parameters}
    outputs = [at_positions(network(clip), 12) for network in (rewired, Literal(tensors, wiring, True))]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for name, parameter in rewired.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-8, atol=1e-9)


def test_two_pathways_of_four_stages_are_chains_without_their_first_blocks():
    backbone, clip = small()
    plan = revwire.plan(backbone, (clip,))
    assert [len(chain.steps) for chain in plan.chains] == [2, 2, 3, 3, 5, 5, 2, 2]


def test_sizes_and_normalisation():
    backbone = build_backbone("slowfast_r101", depths=(1, 1, 1, 1))
    assert backbone.channels == 2048 + 256
    assert (backbone.mean, backbone.std) == ((0.45,) * 3, (0.225,) * 3)
    other = build_backbone("slowfast_r50", depths=(1, 1, 1, 1), base=16, fast=2, wiring="mmaction2")
    assert (other.mean, other.std) == IMAGENET
    slow, fast = other(torch.randn(1, 3, 8, 32, 32))
    assert (slow.shape, fast.shape) == ((1, 512, 2), (1, 64, 8))
    with torch.device("meta"):
        whole = build_backbone("slowfast_r101")
    assert sum(parameter.numel() for parameter in whole.parameters()) == 61_991_240
    with pytest.raises(
        Re2TALError, match="no SlowFast wiring 'caffe'; choose one of pytorchvideo, mmaction2, re2tal"
    ):
        build_backbone("slowfast_r50", wiring="caffe")
    with pytest.raises(Re2TALError, match="takes its weights from a file"):
        build_backbone("slowfast_r50", weights="KINETICS")


def test_each_pathway_goes_to_the_positions_on_its_own():
    slow, fast = torch.randn(2, 3, 4), torch.randn(2, 2, 16)
    joined = at_positions((slow, fast), 6)
    for i in range(6):
        for features, first in ((slow, 0), (fast, 3)):
            steps = features.shape[2]
            at = max((i + 0.5) * steps / 6 - 0.5, 0)  # the middle of a position among the middles of steps
            low, high = int(at), min(int(at) + 1, steps - 1)
            wanted = features[..., low] * (1 - at + low) + features[..., high] * (at - low)
            torch.testing.assert_close(joined[:, first : first + features.shape[1], i], wanted)
    assert torch.equal(at_positions(slow, 4), slow)
    assert at_positions(slow.bfloat16(), 6).dtype == torch.float32
    assert at_positions(slow.double(), 6).dtype == torch.float64
