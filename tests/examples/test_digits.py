"""The digits example: its data, its short training, and the trained file that is kept beside it."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from examples.digits import data, train


@pytest.fixture(scope="module")
def digits():
    return data.load()


def test_split_is_fixed_and_stratified(digits):
    assert len(digits.train.labels) == 1347
    assert len(digits.test.labels) == 450
    for part in (digits.train, digits.test):
        assert part.images.shape == (len(part.labels), 1, 8, 8)
        assert part.images.min() == -1
        assert part.images.max() == 1
        shares = part.labels.bincount(minlength=10) / len(part.labels)
        assert shares.min() > 0.09
        assert shares.max() < 0.11
    assert torch.equal(data.load().test.images, digits.test.images)


def test_augmentation_moves_ink_but_makes_none(digits):
    images = digits.train.images[:64]
    moved = data.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert not torch.equal(moved, images)
    ink = (moved + 1).sum() / (images + 1).sum()
    assert 0.8 < ink < 1.2
    assert torch.equal(moved, data.augment(images, torch.Generator().manual_seed(0)))


def test_empty_paper_stays_empty():
    paper = torch.full((4, 1, 8, 8), -1.0)
    assert torch.equal(data.augment(paper, torch.Generator().manual_seed(0)), paper)


def test_an_epoch_is_made_of_full_batches(digits):
    sizes = [len(labels) for _, labels in data.batches(digits.train, 64, torch.Generator().manual_seed(0))]
    assert sizes == [64] * 21


def test_accuracy_puts_the_mode_back(digits):
    model = train.build().train()
    assert 0 <= data.accuracy(model, digits.test) <= 1
    assert model.training


def test_the_same_seed_trains_the_same_weights(digits):
    few = data.Digits(data.Part(digits.train.images[:128], digits.train.labels[:128]), digits.test)
    first, again, other = (train.train(few, epochs=1, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_what_is_saved_builds_the_model_again(digits, tmp_path):
    model = train.build().eval()
    path = tmp_path / "digits.safetensors"
    train.save(model, path, 0.5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    again = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"])).eval()
    again.load_state_dict(load_file(path))
    assert torch.equal(again(digits.test.images), model(digits.test.images))


def test_the_kept_file_is_a_trained_model(digits):
    assert train.WEIGHTS.stat().st_size < 1_000_000
    with safe_open(train.WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == train.ARCHITECTURE
    assert json.loads(metadata["model_args"]) == train.MODEL_ARGS
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"]))
    model.load_state_dict(load_file(train.WEIGHTS))
    accuracy = data.accuracy(model, digits.test)
    assert accuracy >= 0.98
    assert accuracy == pytest.approx(float(metadata["test_accuracy"]), abs=0.005)
