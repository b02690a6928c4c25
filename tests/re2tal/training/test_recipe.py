"""A run by the reference's recipe, small: from videos to mAP, and a file of one video."""

import json

import numpy as np
import pytest

from examples.re2tal import train
from examples.re2tal.config import Config
from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.data.video import open_video
from examples.re2tal.distributed.world import joined
from examples.re2tal.evaluation.inference import detect_in_file
from examples.re2tal.training.setup import trained
from tests.re2tal import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tiny.data(tmp_path_factory.mktemp("recipe"))
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    for key, video in content["database"].items():
        (file,) = (folder / "videos").glob(f"{key}.*")
        with open_video(file) as reader:
            video["frame"] = len(reader)
    path.write_text(json.dumps(content))
    return folder


def settings(data, output, sampling):
    """Sizes that a CPU has time for; all else is the recipe's."""
    own = tiny.settings(data, output)
    classes = read_annotations(data / "annotations.json").classes
    scores = {v.id: [0.5] * len(classes) for v in read_annotations(data / "annotations.json").videos.values()}
    (data / "scores.json").write_text(json.dumps({"results": scores, "class": list(classes)}))
    options = {"channels": 16, "levels": 3, "stem": 1, "normalizer": 20}
    clip = {
        "sampling": sampling,
        "frames": 32,
        "positions": 16,
        "size": [16, 16],
        "augment": {"short_side": 20},
    }
    found = {"video_classes": str(data / "scores.json")} if sampling == "resize" else {}
    return {
        **{name: own[name] for name in ("output", "data", "loader")},
        "recipe": "opentad",
        "backbone": own["backbone"],
        "clip": clip,
        "head": {"options": {**options, "positions": 16} if sampling == "resize" else options},
        "optim": {"epochs": 1, "warmup": 0.5, "batch": 2, "amp": "none"},
        "evaluation": {"batch": 2, **found},
    }


@pytest.mark.parametrize("sampling", ["window", "resize"])
def test_the_recipe_runs(data, tmp_path, sampling):
    config = Config.model_validate(settings(data, tmp_path / "run", sampling))
    assert config.clip.by == "frame"
    outcome = train.run(config, "cpu")
    assert 0 <= outcome.evaluation.average_mAP <= 1
    assert not outcome.skipped
    annotations = read_annotations(data / "annotations.json")
    for key, found in outcome.results.items():
        assert found.segments.min(initial=0) >= 0
        assert found.segments.max(initial=0) <= round(annotations.videos[key].duration, 2) + 1e-9
        assert np.array_equal(found.segments, np.round(found.segments, 2))
    again, classes, detector = trained(config.output)
    assert again == config
    if sampling == "window":  # classes of whole videos are known of the set's alone
        path = next(iter((data / "videos").glob("validation*")))
        with joined("cpu") as world:
            one, _ = detect_in_file(path, detector, again, classes, world)
        known = outcome.results[path.stem]
        assert np.allclose(one.scores, known.scores, atol=2e-4)
