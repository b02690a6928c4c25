"""What the implementations of ActionFormer do where a video ends before its clip, against formulas written out here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.assignment import assign
from examples.re2tal.heads.base import Head
from examples.re2tal.heads.build import build_head
from examples.re2tal.heads.dialect import DIALECTS
from examples.re2tal.heads.layers import Positions, Projection, Tower
from examples.re2tal.heads.losses import focal_loss
from examples.re2tal.heads.points import points_of

SMALL = {"channels": 8, "levels": 3, "stem": 1, "heads": 2, "window": None, "drop_path": 0.0, "scale": 0.5}
EPS = {"revwire": 1e-5, "opentad": 1e-6, "actionformer": 1e-5}
CLEARED = {"revwire": True, "opentad": True, "actionformer": False}


def small(dialect, **options):
    torch.manual_seed(0)
    head = build_head("actionformer", in_channels=6, classes=3, dialect=dialect, **SMALL, **options).double()
    for parameter in head.parameters():  # nothing at one or zero, where an error could hide
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return head.eval()


def written_out(projection, x, mask, eps, cleared):
    """Convolution, mask, norm over channels, ReLU, and the mask again or not."""
    for conv, norm in zip(projection.convs, projection.norms, strict=True):
        x = functional.conv1d(x, conv.conv.weight, padding=1) * mask[:, None]
        centred = x - x.mean(dim=1, keepdim=True)
        x = centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
        x = (x * norm.weight[:, None] + norm.bias[:, None]).clamp(min=0)
        x = x * mask[:, None] if cleared else x
    return x


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@settings(max_examples=20)
@given(valid=st.integers(1, 9), scale=st.sampled_from([1e-3, 1.0]))
def test_convolutions_beyond_the_end(dialect, valid, scale):
    torch.manual_seed(valid)
    projection = Projection(4, 5, dialect=DIALECTS[dialect]).double()
    tower = Tower(5, 2, 2, 0.3, DIALECTS[dialect]).double()
    for parameter in [*projection.parameters(), *tower.parameters()]:
        torch.nn.init.uniform_(parameter, -1, 1)
    x, mask = (
        scale * torch.randn(2, 4, 9, dtype=torch.float64),
        torch.arange(9)[None] < torch.tensor([[9], [valid]]),
    )
    made = projection(x, mask)
    assert torch.allclose(made, written_out(projection, x, mask, EPS[dialect], CLEARED[dialect]), atol=1e-12)
    body = written_out(tower.body, made, mask, EPS[dialect], CLEARED[dialect])
    wanted = functional.conv1d(body, tower.last.conv.weight, tower.last.conv.bias, padding=1).transpose(1, 2)
    assert torch.allclose(tower(made, mask)[mask], wanted[mask], atol=1e-12)


def test_dialects_differ_where_a_video_ends_early_and_nowhere_else():
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    full, padded = torch.ones(2, 16, dtype=torch.bool), torch.arange(16)[None] < torch.tensor([[16], [9]])
    heads = {name: small(name) for name in DIALECTS}
    whole = {name: head(x, full).logits for name, head in heads.items()}
    assert torch.equal(whole["revwire"], whole["actionformer"])
    assert 0 < (whole["revwire"] - whole["opentad"]).abs().max() < 1e-2  # eps alone
    cut = {name: head(x, padded) for name, head in heads.items()}
    valid = cut["revwire"].mask[1]
    for one, other in (("revwire", "opentad"), ("revwire", "actionformer"), ("opentad", "actionformer")):
        assert (cut[one].logits[1][valid] - cut[other].logits[1][valid]).abs().max() > 1e-4
        assert torch.allclose(cut[one].logits[0], cut[other].logits[0], atol=1e-2)


def test_what_lies_beyond_the_end_reaches_the_references_and_not_ours():
    mask = torch.arange(16)[None] < 9
    one = torch.randn(1, 6, 16, dtype=torch.float64)
    other = torch.where(mask[:, None], one, torch.randn_like(one))
    for name in DIALECTS:
        head = small(name)
        first, second = head(one, mask), head(other, mask)
        same = torch.equal(first.logits[first.mask], second.logits[first.mask])
        assert same is (name == "revwire")


def test_references_start_at_zero_biases():
    for name, dialect in DIALECTS.items():
        head = build_head("actionformer", in_channels=6, classes=3, dialect=name, **SMALL)
        biases = [p for n, p in head.named_parameters() if n.endswith("bias") and "norms" not in n]
        flat = torch.cat([b.flatten() for b in biases if b is not head.classify.last.conv.bias])
        assert bool((flat == 0).all()) is dialect.start_at_zero
        assert torch.allclose(head.classify.last.conv.bias, torch.tensor(-math.log(99.0)))


def test_the_table_of_positions_is_sines_and_cosines():
    table, channels = Positions(6, 10), 6
    mask = torch.arange(8)[None] < 7
    added = table(torch.zeros(1, channels, 8), mask)
    for position in range(8):
        for channel in range(channels):
            angle = position / 10000 ** (2 * (channel // 2) / channels)
            wanted = (
                (math.sin if channel % 2 == 0 else math.cos)(angle) / channels**0.5 if position < 7 else 0.0
            )
            assert float(added[0, channel, position]) == pytest.approx(wanted, abs=1e-6)
    assert not table.state_dict()
    longer = table(torch.zeros(1, channels, 20), torch.ones(1, 20, dtype=torch.bool))
    assert torch.allclose(longer[0], functional.interpolate(table.table, 20, mode="linear")[0])


def test_positions_reach_the_head():
    x, mask = torch.zeros(1, 6, 16, dtype=torch.float64), torch.ones(1, 16, dtype=torch.bool)
    plain, told = small("opentad"), small("opentad", positions=16)
    assert plain(x, mask).logits[0, 6:10].std(dim=0).max() < 1e-9
    assert told(x, mask).logits[0, 6:10].std(dim=0).max() > 1e-6


def test_losses_are_weighted_smoothed_and_divided_by_the_positives_in_evaluation():
    torch.manual_seed(0)
    options = {"normalizer": 50.0, "label_smoothing": 0.1, "loss_weight": 2.0, "momentum": 0.5}
    head = small("opentad", **options)
    plain = small("opentad", normalizer=50.0)
    x, mask = torch.randn(1, 6, 16, dtype=torch.float64), torch.ones(1, 16, dtype=torch.bool)
    segments, labels = [torch.tensor([[2.0, 7.0]])], [torch.tensor([1])]
    one, other = head.loss(head(x, mask), segments, labels), plain.loss(plain(x, mask), segments, labels)
    assert torch.isclose(one.regression, 2 * other.regression)
    assert torch.isclose(one.total, one.regression + one.classification)
    predictions = head(x, mask)
    targets = assign(predictions.points, segments[0], labels[0], 3)[0][None]
    positives = int((targets.sum(dim=2) > 0).sum())
    smoothed = focal_loss(predictions.logits, 0.9 * targets + 0.1 / 4) / positives
    assert one.classification.item() == pytest.approx(smoothed.item(), rel=1e-6)
    training = head.train().loss(head(x, mask), segments, labels)
    after = float(head.normalizer)
    assert after == pytest.approx(25 + 0.5 * positives)
    assert training.total.item() * after == pytest.approx(one.total.item() * positives, rel=1e-6)


def test_bounds_of_levels_are_a_setting():
    bounds = [(0, 2), (2, 5), (5, 99)]
    head = small("opentad", bounds=bounds)
    points = head(torch.zeros(1, 6, 16, dtype=torch.float64), torch.ones(1, 16, dtype=torch.bool)).points
    assert [(float(a), float(b)) for a, b in zip(points.low, points.high, strict=True)][16:24] == [(2, 5)] * 8
    assert torch.equal(points_of(16, 3).position, points.position)
    with pytest.raises(Re2TALError, match="give one pair for each of 3 levels"):
        small("opentad", bounds=bounds[:2])


def test_an_unknown_dialect_is_named():
    with pytest.raises(
        Re2TALError, match=r"head\.options\.dialect 'mmaction'; choose one of revwire, opentad"
    ):
        build_head("actionformer", in_channels=3, classes=2, dialect="mmaction")
    assert isinstance(small("actionformer"), Head)
