"""A published detector on a folder of videos finds what one built by hand finds; nothing is trained."""

import json

import numpy as np
import pytest
import torch
import yaml

from examples.re2tal import evaluate_weights
from examples.re2tal.data import synth
from examples.re2tal.detector import Detector
from examples.re2tal.evaluation.inference import detect
from examples.re2tal.training.setup import annotations_of, clips_of, lay_out, resolved
from tests.helpers.commands import command_of
from tests.re2tal import tiny
from tests.re2tal.weights.made import SLOWFAST
from tests.re2tal.weights.test_convert import HEAD, detector_file

command = command_of(evaluate_weights.main)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    data = tiny.data(folder / "data", 2, 2)
    torch.manual_seed(0)
    path = folder / "epoch_9.pth.tar"
    backbone, head = detector_file(path, classes=len(synth.CLASSES))
    settings = tiny.settings(
        data,
        folder / "out",
        backbone={"name": "slowfast_r50", "options": SLOWFAST[1]},
        clip={"size": [32, 32]},
        evaluation={"threshold": 0.0, "topk": 50},
    )
    settings["head"] = {"name": "actionformer", "options": HEAD}
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    return folder, path, backbone, head


def test_it_finds_what_the_detector_by_hand_finds(published):
    folder, path, backbone, head = published
    done = command(str(path), str(folder / "c.yaml"), f"output={folder / 'out'}", "--device", "cpu")
    assert done.exit_code == 0, done.output
    config = resolved(
        tiny.config(
            folder / "data",
            folder / "other",
            backbone={"name": "slowfast_r50", "options": SLOWFAST[1]},
            clip={"size": [32, 32]},
            evaluation={"threshold": 0.0, "topk": 50},
            detector={"weights": str(path)},
        )
    )
    annotations = annotations_of(config)
    mean, std = backbone.mean, backbone.std
    torch.manual_seed(0)
    laid_out = lay_out(backbone, torch.randn(2, 3, 32, 32, 32), strategy="rewired")
    by_hand = Detector(laid_out, head, positions=16, mean=mean, std=std).eval()
    world = type("Alone", (), {"share": staticmethod(list), "gathered": staticmethod(lambda own: [own])})
    world.device = torch.device("cpu")
    found, _ = detect(
        by_hand, clips_of(config, annotations, training=False), config, annotations.classes, world
    )
    written = json.loads((folder / "out" / "predictions.json").read_text())["results"]
    assert written.keys() == found.keys()
    for key, detections in found.items():
        scores = [entry["score"] for entry in written[key]]
        assert len(scores) > 5
        np.testing.assert_allclose(scores, detections.scores, rtol=1e-4, atol=1e-6)
    assert {"results.json", "report.html"} <= {p.name for p in (folder / "out").iterdir()}
    assert not (folder / "out" / "checkpoints").exists()


def test_what_does_not_fit_is_one_line(published, tmp_path):
    folder, path, _, _ = published
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in (*synth.CLASSES, "more")))
    call = [str(path), str(folder / "c.yaml"), f"data.classes={folder / 'names.txt'}", f"output={tmp_path}"]
    done = command(*call, "--device", "cpu")
    assert done.exit_code == 1
    assert "does not fit the head" in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []
