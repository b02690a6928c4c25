import numpy as np
import torch
from torch import nn

from examples.re2tal.backbones.build import build_backbone
from examples.re2tal.data.dataset import Batch
from examples.re2tal.data.sampling import TimeGrid
from examples.re2tal.detector import Detector, candidates
from examples.re2tal.heads.base import Predictions
from examples.re2tal.heads.build import build_head
from examples.re2tal.heads.classification import SegmentClassifier
from examples.re2tal.heads.points import points_of

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


class Seen(nn.Module):
    """A backbone that hands the mean of each picture on."""

    def forward(self, clip):
        self.clip = clip
        return clip.mean(dim=(3, 4))


def detector(positions=8, **options):
    head = build_head("convolutional", in_channels=3, classes=2, channels=8, levels=2, stem=1)
    return Detector(Seen(), head, positions=positions, mean=MEAN, std=STD, **options)


def test_pixels_are_normalized_colour_by_colour():
    frames = torch.randint(0, 256, (2, 8, 3, 4, 4), dtype=torch.uint8)
    model = detector()
    model.features(frames)
    for colour in range(3):
        wanted = (frames[:, :, colour].float() / 255 - MEAN[colour]) / STD[colour]
        assert torch.allclose(model.backbone.clip[:, colour], wanted, atol=1e-5)


def test_features_are_interpolated_to_the_positions():
    frames = torch.randint(0, 256, (1, 8, 3, 4, 4), dtype=torch.uint8)
    model = detector(positions=4)
    features = model.features(frames)
    pairs = model.backbone.clip.mean(dim=(3, 4)).unflatten(2, (4, 2)).mean(dim=3)
    assert torch.allclose(features, pairs, atol=1e-5)


def test_a_batch_has_a_loss_with_gradients():
    model = detector()
    batch = Batch(
        ["a", "b"],
        torch.randint(0, 256, (2, 8, 3, 4, 4), dtype=torch.uint8),
        [torch.tensor([[1.0, 5.0]]), torch.zeros(0, 2)],
        [torch.tensor([1]), torch.zeros(0, dtype=torch.long)],
        torch.ones(2, 8, dtype=torch.bool),
        [TimeGrid(0, 1, 8)] * 2,
    )
    losses = model.loss(batch)
    assert torch.equal(losses.total, losses.classification + losses.regression)
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_batch_norms_stay_as_they_are():
    backbone = build_backbone("convnet", width=4)
    head = build_head("convolutional", in_channels=16, classes=2, channels=8, levels=2, stem=1)
    model = Detector(backbone, head, positions=8, mean=MEAN, std=STD, freeze_batch_norm=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm3d)]
    before = [norm.running_mean.clone() for norm in norms]
    model.features(torch.randint(0, 256, (1, 16, 3, 32, 32), dtype=torch.uint8))
    assert norms
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert any(p.requires_grad for p in backbone.parameters())


def test_candidates_are_the_best_pairs_of_point_and_class():
    torch.manual_seed(0)
    points = points_of(8, 2)
    logits, offsets = torch.randn(2, 12, 3) * 3, torch.rand(2, 12, 2) * 4
    mask = torch.rand(2, 12) > 0.3
    found = candidates(Predictions(logits, offsets, points, mask), threshold=0.4, topk=5)
    for clip in range(2):
        rows = []
        for i in range(12):
            for k in range(3):
                score = float(logits[clip, i, k].sigmoid())
                if mask[clip, i] and score > 0.4:
                    t, stride = float(points.position[i]), float(points.stride[i])
                    left, right = (offsets[clip, i] * stride).tolist()
                    rows.append((score, t - left, t + right, k))
        rows = sorted(rows, reverse=True)[:5]
        assert np.allclose(found[clip].scores, [row[0] for row in rows], atol=1e-6)
        assert np.allclose(found[clip].segments, [row[1:3] for row in rows], atol=1e-5)
        assert found[clip].labels.tolist() == [row[3] for row in rows]


def test_actions_are_classified_by_the_mean_of_their_features():
    head = SegmentClassifier(3, 2)
    features = torch.randn(2, 3, 8)
    segments = [torch.tensor([[2.0, 4.0], [0.0, 8.0]]), torch.tensor([[6.5, 6.9]])]
    means = torch.stack([features[0, :, 2:4].mean(1), features[0].mean(1), features[1, :, 6]])
    assert torch.allclose(head.logits(features, segments), head.classify(means), atol=1e-6)
    losses = head.loss(features, segments, [torch.tensor([0, 1]), torch.tensor([1])])
    wanted = nn.functional.cross_entropy(head.classify(means), torch.tensor([0, 1, 1]))
    assert torch.allclose(losses.total, wanted)
    none = head.loss(features, [torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    assert float(none.total.detach()) == 0
