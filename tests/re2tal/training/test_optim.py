"""Rates, averages and groups as OpenTAD has them, against formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from examples.re2tal.detector import Detector
from examples.re2tal.heads.build import build_head
from examples.re2tal.training.optim import Average, optimizer_of, schedule


def rates(base, *arguments, steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler, found = schedule(optimizer, *arguments, **options), []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@given(
    base=st.sampled_from([1.0, 1e-3, 1e-5]),
    warmup=st.integers(2, 20),
    fall=st.integers(5, 80),
    least=st.sampled_from([0.0, 1e-8]),
)
def test_rates_from_zero_follow_the_chained_rule(base, warmup, fall, least):
    """Step by step from the rate before, as OpenTAD's scheduler computes them."""
    total = warmup + fall
    found = rates(base, warmup, total, steps=total, from_zero=True, least=least)
    rate = 0.0
    for step in range(total):
        if 0 < step < warmup:
            rate += base / (warmup - 1)
        elif step == warmup:
            rate = base
        elif step > warmup:
            now, before = (1 + math.cos(math.pi * (s - warmup) / fall) for s in (step, step - 1))
            rate = now / before * (rate - least) + least
        assert found[step] == pytest.approx(rate, rel=1e-6, abs=1e-15)


def test_a_cosine_for_more_epochs_than_are_run_hardly_falls():
    found = rates(1.0, 50, 15000, steps=1200, from_zero=True)
    assert found[0] == 0
    assert found[49] == found[50] == 1
    assert found[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 1149 / 14950)))


def test_an_average_without_a_warm_up_keeps_its_decay_from_the_first_step():
    model = nn.Linear(2, 1)
    average = Average(model, 0.9, warmup=False)
    followed = model.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.normal_()
        average.update(step)
        followed = 0.9 * followed + 0.1 * model.weight.detach()
    assert torch.allclose(average.tensors["weight"], followed, atol=1e-6)


class Frames(nn.Module):
    """A backbone with every kind of norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(3, 4), nn.LayerNorm(4)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.BatchNorm1d(4)])

    def forward(self, clip):
        x = self.embed(clip.mean(dim=(3, 4)).transpose(1, 2))
        for norm in self.norms:
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return self.last(x).transpose(1, 2)


def detector(**options):
    head = build_head("actionformer", in_channels=4, classes=2, channels=8, levels=2, stem=1, heads=2)
    return Detector(Frames(), head, positions=8, mean=(0, 0, 0), std=(1, 1, 1), **options)


@pytest.mark.parametrize("backbone", ["weights", "all"])
def test_what_decays(backbone):
    model = detector()
    settings = SimpleNamespace(lr=1e-3, backbone_lr=1e-5, weight_decay=0.05, decay_backbone=backbone)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer_of(model, settings).param_groups
        for p in group["params"]
    }
    layers = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d)
    }
    assert decays.keys() == set(names.values())
    for name, (rate, decay) in decays.items():
        in_backbone = name.startswith("backbone.")
        assert rate == (1e-5 if in_backbone else 1e-3)
        assert (decay > 0) == (name in layers or (in_backbone and backbone == "all")), name
    assert decays["head.pyramid.stem.0.scales.0"][1] == 0


def test_all_norms_of_the_backbone_are_frozen_and_nothing_else():
    model = detector(freeze_norms=True).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ("backbone.last", "backbone.norms.0", "backbone.norms.1")
    assert frozen == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert not any(module.training for module in [model.backbone.last, *model.backbone.norms])
    before = model.backbone.norms[1].running_mean.clone()
    model(torch.zeros(1, 8, 3, 4, 4, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.bool))
    assert torch.equal(model.backbone.norms[1].running_mean, before)
