import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from examples.re2tal import synth as command
from examples.re2tal.data import synth
from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.data.video import open_video


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_same_seed_makes_the_same_videos_and_a_stopped_run_goes_on(tmp_path):
    result = invoke(tmp_path / "one", "--videos", 2, "--held-out", 1, "--processes", 1)
    assert result.exit_code == 0, result.output
    truth = read_annotations(tmp_path / "one" / "annotations.json")
    assert len(truth.subset("training")) == 2
    assert set(truth.classes) <= set(synth.CLASSES)
    files = sorted((tmp_path / "one" / "videos").iterdir())
    for file in files:
        with open_video(file) as reader:
            assert np.isclose(reader.duration, truth.videos[file.stem].duration)
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert invoke(tmp_path / "one", "--videos", 3, "--held-out", 1, "--processes", 1).exit_code == 0
    assert files[0].stat().st_mtime_ns == before
    invoke(tmp_path / "two", "--videos", 3, "--held-out", 1, "--processes", 2)
    for file in files:
        with open_video(file) as one, open_video(tmp_path / "two" / "videos" / file.name) as two:
            assert np.array_equal(one.read(range(len(one))), two.read(range(len(two))))
    texts = [(tmp_path / name / "annotations.json").read_text() for name in ("one", "two")]
    assert json.loads(texts[0]) == json.loads(texts[1])


def test_a_video_is_the_same_file_every_time(tmp_path):
    """x264 with its tree of macroblocks makes a different file in a tenth to a third of runs."""
    (video,) = synth.videos(1, 0, 0)
    files = set()
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        synth.make(video, folder)
        files.add((folder / f"{video.id}.mp4").read_bytes())
    assert len(files) == 1


def test_another_seed_makes_other_videos():
    scenes = [synth._Scene.of((seed, 0)) for seed in (0, 1)]
    assert scenes[0].actions != scenes[1].actions


@pytest.mark.parametrize("number", range(20))
def test_actions_do_not_overlap_and_lie_within_the_video(number):
    scene = synth._Scene.of((7, number))
    assert 2 <= len(scene.actions) <= 5
    edges = [moment for start, end, _ in scene.actions for moment in (start, end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= scene.duration


def test_a_single_picture_does_not_tell_the_class():
    """A linear classifier on pictures of actions does about as well as chance on other videos."""
    features, labels, owners = [], [], []
    for number in range(60):
        scene = synth._Scene.of((11, number))
        pictures = list(scene.pictures())
        for start, end, label in scene.actions:
            picture = pictures[int((start + end) / 2 * scene.rate)]
            features.append(picture.reshape(12, 8, 12, 8, 3).mean(axis=(1, 3)).ravel() / 255)
            labels.append(label)
            owners.append(number)
    x, y = np.column_stack([np.array(features), np.ones(len(features))]), np.eye(len(synth.CLASSES))[labels]
    train = np.array(owners) < 40
    weights = np.linalg.solve(x[train].T @ x[train] + 10 * np.eye(x.shape[1]), x[train].T @ y[train])
    right = ((x[~train] @ weights).argmax(axis=1) == np.array(labels)[~train]).mean()
    chance = np.bincount(np.array(labels)[~train]).max() / (~train).sum()
    assert right < chance + 0.15
