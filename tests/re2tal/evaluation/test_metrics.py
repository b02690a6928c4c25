import json
import math

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from examples.re2tal import evaluate as command
from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
from examples.re2tal.evaluation.metrics import ACTIVITYNET, THUMOS, average_precision, evaluate, recall_at
from examples.re2tal.evaluation.postprocess import Detections, write_submission

CLASSES = ("a", "b", "c")


def official(truth, predictions, tiou):
    """The official evaluation, step by step as its code does, on lists of (video, start, end[, score]) of one class."""
    order = np.argsort([row[3] for row in predictions], kind="stable")[::-1]
    predictions = [predictions[i] for i in order]
    taken = [set() for _ in tiou]
    hits = np.zeros((len(tiou), len(predictions)))
    for j, (video, start, end, _) in enumerate(predictions):
        candidates = [i for i, row in enumerate(truth) if row[0] == video]
        ious = [overlap((start, end), truth[i][1:]) for i in candidates]
        for t, threshold in enumerate(tiou):
            for k in np.argsort(ious, kind="stable")[::-1]:
                if ious[k] < threshold:
                    break
                if candidates[k] not in taken[t]:
                    taken[t].add(candidates[k])
                    hits[t, j] = 1
                    break
    return [area(row.cumsum() / np.arange(1, len(row) + 1), row.cumsum() / len(truth)) for row in hits]


def overlap(one, other):
    inner = max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)
    union = (other[1] - other[0]) + (one[1] - one[0]) - inner
    return inner / union if union > 0 else 0.0


def area(precision, recall):
    recall, precision = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((b - a) * p for a, b, p in zip(recall[:-1], recall[1:], precision[1:], strict=True))


moments = st.integers(0, 40).map(lambda n: n / 2)
lengths = st.integers(0, 20).map(lambda n: n / 2)
actions = st.lists(st.tuples(st.integers(0, 3), moments, lengths, st.integers(0, 2)), min_size=1, max_size=14)
# few different scores: ties are the rule
found = st.lists(
    st.tuples(st.integers(0, 4), moments, lengths, st.integers(0, 2), st.integers(1, 6).map(lambda n: n / 7)),
    max_size=25,
)


def annotations(drawn):
    videos = {
        f"v{n}": AnnotatedVideo(
            f"v{n}", "validation", 100.0, None, None,
            tuple(Action(s, s + d + 0.5, CLASSES[k]) for v, s, d, k in drawn if v == n),
        )
        for n in range(4)
    }  # fmt: skip
    return Annotations(videos, CLASSES)


def results(drawn):
    return {
        f"v{n}": Detections.of(
            [(s, s + d) for v, s, d, _, _ in drawn if v == n],
            [p for v, *_, p in drawn if v == n],
            [k for v, _, _, k, _ in drawn if v == n],
        )
        for n in sorted({v for v, *_ in drawn})
    }


@settings(max_examples=60)
@given(actions, found, st.sampled_from([ACTIVITYNET, THUMOS]))
def test_map_is_the_official_one(drawn, predicted, tiou):
    """Random sets: several actions and predictions of a video, ties, duplicates, unknown videos, missing classes."""
    truth, given_results = annotations(drawn), results(predicted)
    evaluation = evaluate(truth, given_results, subset="validation", tiou=tiou)
    assert evaluation.classes == tuple(c for c in CLASSES if any(CLASSES[k] == c for *_, k in drawn))
    for i, name in enumerate(evaluation.classes):
        label = CLASSES.index(name)
        of_class = [(f"v{v}", s, s + d + 0.5) for v, s, d, k in drawn if k == label]
        rows = [
            (video, *segment, score)
            for video, d in given_results.items()
            for segment, score, k in zip(d.segments, d.scores, d.labels, strict=True)
            if k == label
        ]
        assert np.allclose(evaluation.ap[:, i], official(of_class, rows, tiou), atol=1e-9, rtol=0)
    assert math.isclose(evaluation.average_mAP, evaluation.ap.mean(), abs_tol=1e-12)


def one(segments, predictions, tiou=(0.5,)):
    truth = Annotations(
        {"v": AnnotatedVideo("v", "s", 100.0, None, None, tuple(Action(*s, "a") for s in segments))}, ("a",)
    )
    rows = Detections.of([p[:2] for p in predictions], [p[2] for p in predictions], [0] * len(predictions))
    return evaluate(truth, {"v": rows}, subset="s", tiou=np.array(tiou)).ap[:, 0].tolist()


def test_cases_by_hand():
    assert one([(0, 10)], [(0, 10, 0.9)]) == [1.0]
    assert one([(0, 10)], []) == [0.0]
    assert one([(0, 10)], [(20, 30, 0.9), (0, 10, 0.5)]) == [0.5]
    # half of the actions found, first
    assert one([(0, 10), (50, 60)], [(0, 10, 0.9), (70, 80, 0.5)]) == [0.5]
    # 6/10 overlap: found at 0.5 and 0.6, not at 0.7
    assert one([(0, 10)], [(0, 6, 0.9)], (0.5, 0.6, 0.7)) == [1.0, 1.0, 0.0]


def test_a_second_detection_takes_the_next_best_action():
    """VOC and COCO would call it a false positive: its best action is taken."""
    assert one([(0, 10), (1, 11)], [(0, 10, 0.9), (0.2, 10, 0.8)]) == [1.0]


def test_an_action_that_is_annotated_twice_counts_twice_unless_told_otherwise():
    truth = Annotations(
        {"v": AnnotatedVideo("v", "s", 9.0, None, None, (Action(1, 2, "a"), Action(1.0004, 2, "a")))}, ("a",)
    )
    rows = {"v": Detections.of([(1, 2)], [0.5], [0])}
    assert evaluate(truth, rows, subset="s", tiou=THUMOS).average_mAP == 0.5
    assert evaluate(truth, rows, subset="s", tiou=THUMOS, drop_duplicates=True).average_mAP == 1.0


def test_average_precision_of_a_curve_by_hand():
    assert average_precision(np.array([1.0, 0.5, 2 / 3]), np.array([0.5, 0.5, 1.0])) == pytest.approx(
        0.5 + 0.5 * 2 / 3
    )
    assert average_precision(np.empty(0), np.empty(0)) == 0.0


def test_recall_counts_the_best_k_times_the_number_of_actions():
    truth = annotations([(0, 0.0, 4.5, 0), (0, 10.0, 4.5, 0), (1, 0.0, 4.5, 1)])
    rows = {
        "v0": Detections.of([(0, 5), (20, 25), (10, 15)], [0.9, 0.8, 0.7], [0, 0, 0]),
        "v1": Detections.of([(0, 5)], [0.5], [0]),
    }
    recall = recall_at(truth, rows, subset="validation", tiou=np.array([0.5]), times=(1, 2))
    assert recall[:, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    every = {"subset": "validation", "tiou": np.array([0.5]), "times": (1, 2)}
    # class 0 is found in half and in whole, class 1 never
    assert recall_at(truth, rows, by_class=True, **every)[:, 0].tolist() == pytest.approx([1 / 4, 1 / 2])


@pytest.fixture
def files(tmp_path):
    database = {
        "v": {
            "subset": "validation",
            "duration": 20,
            "annotations": [{"label": "a", "segment": [1, 5]}, {"label": "b", "segment": [8, 9]}],
        },
        "t": {"subset": "testing", "duration": 20, "annotations": []},
        "w": {"subset": "training", "duration": 20, "annotations": [{"label": "c", "segment": [1, 5]}]},
    }
    truth, predictions = tmp_path / "truth.json", tmp_path / "predictions.json"
    truth.write_text(json.dumps({"database": database}))
    rows = {
        "v": Detections.of([(1, 5), (8, 12)], [0.9, 0.3], [0, 1]),
        "x": Detections.of([(0, 1)], [1.0], [0]),
    }
    write_submission(predictions, rows, ("a", "b", "c"))
    return truth, predictions


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_prints_one_object_or_a_table(files):
    result = invoke(*files, "--tiou", "0.5:0.05:0.95", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert np.allclose(told["tiou"], np.linspace(0.5, 0.95, 10))
    assert told["mAP"] == [0.25] * 10
    assert told["average_mAP"] == 0.25
    assert told["unknown_videos"] == 1
    table = invoke(*files, "--tiou", "0.2,0.5")
    assert table.exit_code == 0
    assert "0.7500" in table.output
    assert "counted as false: predictions of 1 videos" in table.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--subset", "val"], "no video of the subset 'val'"),
        (["--subset", "testing"], "of the subset 'testing' have no actions to evaluate against"),
        (["--tiou", "2"], "'2' are no thresholds"),
    ],
)
def test_the_command_says_what_is_wrong(files, change, told):
    result = invoke(*files, *change)
    assert result.exit_code == 1
    assert told in " ".join(result.output.split())
