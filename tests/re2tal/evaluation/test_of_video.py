"""From the candidates of a video's clips to its detections: ours, and in OpenTAD's order of cutting and rounding."""

import numpy as np
import pytest

from examples.re2tal.config import Config
from examples.re2tal.data.sampling import TimeGrid
from examples.re2tal.detector import Candidates
from examples.re2tal.evaluation.inference import in_seconds, of_video
from examples.re2tal.evaluation.postprocess import Detections, soft_nms, tiou
from tests.re2tal import tiny

DURATION = 10.0


def setting(tmp_path, sampling="window", agnostic=False, **evaluation):
    classes = {"video_classes": "scores.json"} if agnostic else {}
    own = tiny.settings(
        tmp_path,
        tmp_path,
        clip={"sampling": sampling},
        evaluation={"sigma": 0.7, **classes, **evaluation},
    )
    own["data"]["class_agnostic"] = agnostic
    return Config.model_validate(own)


def of(*rows):
    return Detections.of([row[:2] for row in rows], [row[2] for row in rows], [0] * len(rows))


def test_ours_are_cut_to_the_video_first_and_not_rounded(tmp_path):
    windows = [of((-3.0, 4.0, 0.91239)), of((-1.0, 4.0, 0.8), (7.123456, 13.0, 0.5))]
    found = of_video(windows, setting(tmp_path), DURATION)
    # cut to the video, the first two are the same segment
    assert found.segments.tolist() == [[0.0, 4.0], [7.123456, 10.0], [0.0, 4.0]]
    assert found.scores == pytest.approx([0.91239, 0.5, 0.8 * np.exp(-1 / 0.7)])


def test_opentad_rounds_windows_before_and_after(tmp_path):
    windows = [of((1.004, 4.0, 0.91239)), of((1.0, 4.003, 0.80004))]
    found = of_video(windows, setting(tmp_path, dialect="opentad"), DURATION)
    assert found.segments.tolist() == [[1.0, 4.0], [1.0, 4.0]]
    assert found.scores.tolist() == [0.9124, round(0.8 * np.exp(-1 / 0.7), 4)]


def test_opentad_cuts_whole_videos_after(tmp_path):
    rows = (-3.0, 4.0, 0.9), (-1.0, 4.0, 0.8)
    config = setting(tmp_path, "resize", agnostic=True, dialect="opentad", voting=0.99, vote_weight="score")
    found = of_video([of(*rows)], config, DURATION, np.array([0.5, 0.1, 0.25]))
    apart = float(tiou(np.array(rows[0][:2]), np.array(rows[1][:2])))
    second = 0.8 * np.exp(-(apart**2) / 0.7)
    assert found.segments.tolist() == [[0.0, 4.0]] * 4
    wanted = sorted((0.45, 0.225, 0.5 * second, 0.25 * second), reverse=True)
    assert found.scores == pytest.approx(wanted, abs=5e-5)
    assert set(found.labels.tolist()) == {0, 2}


def test_candidates_keep_their_length_beyond_a_window(tmp_path):
    clip = Candidates(np.array([[-2.0, 3.0], [6.0, 12.0]]), np.array([0.9, 0.8]), np.array([0, 1]))
    grid = TimeGrid(30.0, 4.0, DURATION, rate=30.0)
    found = in_seconds(clip, grid, setting(tmp_path).evaluation)
    assert found.segments == pytest.approx(np.array([[22 / 30, 42 / 30], [54 / 30, 78 / 30]]))
    single = in_seconds(clip, grid, setting(tmp_path, dialect="opentad").evaluation)
    assert np.array_equal(single.segments, found.segments.astype(np.float32).astype(np.float64))


def test_least_score_and_limit_are_settings(tmp_path):
    rows = of((0.0, 1.0, 0.5), (2.0, 3.0, 0.2), (4.0, 5.0, 0.1))
    assert len(of_video([rows], setting(tmp_path, min_score=0.15), DURATION)) == 2
    assert len(of_video([rows], setting(tmp_path, limit=1), DURATION)) == 1
    assert len(soft_nms(rows)) == 3
