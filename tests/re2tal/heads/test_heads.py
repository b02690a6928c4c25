import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.assignment import assign
from examples.re2tal.heads.build import NAMES, build_head
from examples.re2tal.heads.layers import LocalAttention, MaskedConv, TransformerBlock
from examples.re2tal.heads.losses import diou_loss, focal_loss
from examples.re2tal.heads.points import points_of, ranges

SMALL = {
    "actionformer": {"channels": 16, "levels": 3, "stem": 1, "heads": 2, "window": 5, "drop_path": 0.0},
    "convolutional": {"channels": 16, "levels": 3, "stem": 1},
}


def literal_assignment(points, segments, labels, classes):
    """The rules of ActionFormer's section 3.4 and its code, one point and one action at a time."""
    targets = torch.zeros(len(points), classes)
    distances = torch.zeros(len(points), 2)
    for i in range(len(points)):
        t, stride = float(points.position[i]), float(points.stride[i])
        found = []
        for (start, end), label in zip(segments.tolist(), labels.tolist(), strict=True):
            centre = (start + end) / 2
            inside = max(centre - 1.5 * stride, start) < t < min(centre + 1.5 * stride, end)
            far = max(t - start, end - t)
            if inside and points.low[i] <= far <= points.high[i]:
                found.append((end - start, start, end, label))
        if found:
            length = min(f[0] for f in found)
            for f in found:
                if f[0] <= length + 1e-3:
                    targets[i, f[3]] = 1
            _, start, end, _ = next(f for f in found if f[0] == length)
            distances[i] = torch.tensor([t - start, end - t]) / stride
    return targets, distances


segments_of_a_clip = st.lists(
    st.tuples(st.integers(0, 120), st.integers(1, 120), st.integers(0, 3)), min_size=0, max_size=6
)


@settings(max_examples=60)
@given(segments_of_a_clip)
def test_assignment_follows_the_rules_literally(drawn):
    # quarters of a position: exact in float32, so that no rounding decides
    segments = torch.tensor([(s / 4, (s + n) / 4) for s, n, _ in drawn]).reshape(-1, 2)
    labels = torch.tensor([k for *_, k in drawn], dtype=torch.long)
    points = points_of(32, 4)
    targets, distances = assign(points, segments, labels, 4)
    wanted, literal = literal_assignment(points, segments, labels, 4)
    assert torch.equal(targets, wanted)
    positive = targets.sum(dim=1) > 0
    assert torch.equal(distances[positive], literal[positive])


def test_a_segment_of_two_classes_asks_for_both():
    segments = torch.tensor([[2.0, 5.0], [2.0, 5.0]])
    targets, _ = assign(points_of(8, 1), segments, torch.tensor([0, 2]), 3)
    assert targets[3].tolist() == [1, 0, 1]


def test_points_and_ranges():
    points = points_of(16, 3)
    assert len(points) == 16 + 8 + 4
    assert points.position[-4:].tolist() == [0, 4, 8, 12]
    assert points.stride[-1] == 4
    assert ranges(6) == [(0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)]


def test_diou_against_its_formula():
    torch.manual_seed(0)
    a, b = torch.rand(50, 2, dtype=torch.float64) * 5, torch.rand(50, 2, dtype=torch.float64) * 5
    total = 0.0
    for (left, right), (wanted_left, wanted_right) in zip(a.tolist(), b.tolist(), strict=True):
        one, other = (-left, right), (-wanted_left, wanted_right)
        overlap = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
        union = left + right + wanted_left + wanted_right - overlap
        hull = max(one[1], other[1]) - min(one[0], other[0])
        apart = (sum(one) - sum(other)) / 2
        total += 1 - overlap / union + (apart / hull) ** 2
    ends = torch.tensor([-1.0, 1.0])  # distances to segments around zero
    assert math.isclose(float(diou_loss(a * ends, b * ends)), total, rel_tol=1e-9)
    same = torch.tensor([[1.0, 2.0]])
    assert float(diou_loss(same, same)) == pytest.approx(0, abs=1e-6)


def test_losses_have_finite_gradients_where_nothing_overlaps():
    predicted = torch.zeros(3, 2, requires_grad=True)
    diou_loss(predicted, torch.tensor([[0.0, 0.0], [1.0, 2.0], [-0.5, 3.0]])).backward()
    assert predicted.grad.isfinite().all()


def test_focal_loss_against_its_formula():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 3), (torch.rand(7, 3) > 0.5).float()
    p = logits.sigmoid()
    right = p * targets + (1 - p) * (1 - targets)
    weight = 0.25 * targets + 0.75 * (1 - targets)
    assert torch.allclose(focal_loss(logits, targets), -(weight * (1 - right) ** 2 * right.log()).sum())


@pytest.mark.parametrize("window", [3, 7, None])
def test_local_attention_is_full_attention_with_a_band(window):
    torch.manual_seed(0)
    layer = LocalAttention(8, 2, window, 1)
    x, mask = torch.randn(2, 8, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 9:] = False
    x = x * mask[:, None]
    query, key, value = (
        into(norm(conv(x, mask))).unflatten(1, (2, 4))
        for conv, norm, into in zip(layer.before, layer.norms, layer.inward, strict=True)
    )
    out = torch.zeros(2, 8, 12)
    for clip in range(2):
        for i in range(12):
            near = [j for j in range(12) if mask[clip, j] and (window is None or abs(i - j) <= window // 2)]
            if not mask[clip, i]:
                continue
            for head in range(2):
                scores = torch.stack([query[clip, head, :, i] @ key[clip, head, :, j] for j in near]) / 2
                heads = slice(4 * head, 4 * head + 4)
                weights = functional.softmax(scores, dim=0)
                out[clip, heads, i] = sum(
                    w * value[clip, head, :, j] for w, j in zip(weights, near, strict=True)
                )
    assert torch.allclose(layer(x, mask), layer.outward(out) * mask[:, None], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beyond_the_end_changes_nothing(name):
    torch.manual_seed(0)
    head = build_head(name, in_channels=6, classes=3, **SMALL[name]).eval()
    mask = torch.arange(16)[None] < torch.tensor([[16], [10]])
    x = torch.randn(2, 6, 16)
    other = torch.where(mask[:, None], x, torch.randn(2, 6, 16))
    one, two = head(x, mask), head(other, mask)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.offsets, two.offsets)
    assert one.mask.sum() == 16 + 8 + 4 + 10 + 5 + 3


@pytest.mark.parametrize("name", NAMES)
def test_a_head_learns_one_batch_by_heart(name):
    torch.manual_seed(0)
    head = build_head(name, in_channels=6, classes=3, normalizer=10, **SMALL[name])
    if name == "actionformer":
        for scale in head.parameters():
            if scale.shape == (16, 1):
                torch.nn.init.ones_(scale)
    x, mask = torch.randn(2, 6, 16), torch.ones(2, 16, dtype=torch.bool)
    segments = [torch.tensor([[2.0, 5.0], [7.0, 15.0]]), torch.zeros(0, 2)]
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    totals = []
    for _ in range(80):
        losses = head.loss(head(x, mask), segments, labels)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total.detach()))
    assert totals[-1] < 0.1 * totals[0]
    predictions = head.eval()(x, mask)
    points = predictions.points
    best = predictions.logits[0, :, 2].argmax()
    left, right = (predictions.offsets[0, best] * points.stride[best]).tolist()
    found = float(points.position[best]) - left, float(points.position[best]) + right
    assert np.allclose(found, (7, 15), atol=0.6)
    assert predictions.logits[1].max() < predictions.logits[0].max() - 2


def test_the_normalizer_follows_the_positives_in_training_alone():
    head = build_head("convolutional", in_channels=6, classes=1, normalizer=100, **SMALL["convolutional"])
    x, mask = torch.randn(1, 6, 16), torch.ones(1, 16, dtype=torch.bool)
    segments, labels = [torch.tensor([[2.0, 5.0]])], [torch.tensor([0])]
    predictions = head(x, mask)
    positives = int((assign(predictions.points, segments[0], labels[0], 1)[0] > 0).sum())
    assert positives > 0
    head.loss(predictions, segments, labels)
    assert float(head.normalizer) == pytest.approx(90 + 0.1 * positives)
    head.eval().loss(predictions, segments, labels)
    assert float(head.normalizer) == pytest.approx(90 + 0.1 * positives)
    assert "normalizer" in head.state_dict()


def test_a_strided_block_halves_the_sequence_and_its_mask():
    mask = torch.arange(8)[None] < 5
    x, after = TransformerBlock(8, 2, 3, stride=2)(torch.randn(1, 8, 8), mask)
    assert x.shape == (1, 8, 4)
    assert after.tolist() == [[True, True, True, False]]
    assert (x[:, :, 3] == 0).all()


def test_a_masked_convolution_is_zero_beyond_the_end():
    x = MaskedConv(3, 4, 3)(torch.randn(2, 3, 6), torch.arange(6).expand(2, 6) < 4)
    assert (x[:, :, 4:] == 0).all()
    assert x[:, :, :4].any()


def test_errors_name_the_way_out():
    with pytest.raises(Re2TALError, match="choose one of actionformer, convolutional"):
        build_head("tridet", in_channels=3, classes=2)
    with pytest.raises(Re2TALError, match=r"head convolutional: .*window"):
        build_head("convolutional", in_channels=3, classes=2, window=3)
    head = build_head("convolutional", in_channels=3, classes=2, **SMALL["convolutional"])
    with pytest.raises(Re2TALError, match="18 positions do not divide by 4"):
        head(torch.randn(1, 3, 18), torch.ones(1, 18, dtype=torch.bool))
