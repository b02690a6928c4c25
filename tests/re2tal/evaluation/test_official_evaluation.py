"""The evaluation command against ActivityNet's official code, written down from its steps, on whole files."""

import json
import time

import numpy as np
import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from examples.re2tal import evaluate as command

TIOU = {"0.5:0.05:0.95": np.linspace(0.5, 0.95, 10), "0.3:0.1:0.7": np.linspace(0.3, 0.7, 5)}


def official(truth, predictions, subset, tiou, *, ignored=("Ambiguous",), blocked=(), kind="stable"):
    """mAP by threshold: `ANETdetection.evaluate`, with lists of rows in place of tables.

    Its sorts are `argsort()[::-1]`, which leaves the order of ties to numpy; `kind` fixes it.
    """
    actions, found = {}, {}
    for video, entry in truth["database"].items():
        if entry["subset"] == subset and video not in blocked:
            for row in entry["annotations"]:
                if row["label"] not in ignored:
                    actions.setdefault(row["label"], []).append((video, *map(float, row["segment"])))
    for video, rows in predictions["results"].items():
        if video not in blocked:
            for row in rows:
                segment = tuple(map(float, row["segment"]))
                found.setdefault(row["label"], []).append((video, *segment, row["score"]))
    return np.mean(
        [average_precision(actions[label], found.get(label, []), tiou, kind) for label in actions], axis=0
    )


def average_precision(actions, found, tiou, kind):
    if not found:
        return np.zeros(len(tiou))
    by_video = {}
    for i, (video, start, end) in enumerate(actions):
        by_video.setdefault(video, []).append((i, start, end))
    lock = np.full((len(tiou), len(actions)), -1)
    order = np.array([row[3] for row in found]).argsort(kind=kind)[::-1]
    tp, fp = np.zeros((len(tiou), len(found))), np.zeros((len(tiou), len(found)))
    for idx, (video, start, end, _) in enumerate(found[i] for i in order):
        if video not in by_video:
            fp[:, idx] = 1
            continue
        own = by_video[video]
        overlaps = segment_iou((start, end), np.array([row[1:] for row in own]))
        by_overlap = overlaps.argsort(kind=kind)[::-1]
        for tidx, threshold in enumerate(tiou):
            for jdx in by_overlap:
                if overlaps[jdx] < threshold:
                    fp[tidx, idx] = 1
                    break
                if lock[tidx, own[jdx][0]] >= 0:
                    continue
                tp[tidx, idx] = 1
                lock[tidx, own[jdx][0]] = idx
                break
            if fp[tidx, idx] == 0 and tp[tidx, idx] == 0:
                fp[tidx, idx] = 1
    tp, fp = np.cumsum(tp, axis=1), np.cumsum(fp, axis=1)
    return [interpolated(tp[t] / (tp[t] + fp[t]), tp[t] / len(actions)) for t in range(len(tiou))]


def segment_iou(target, candidates):
    first, last = np.maximum(target[0], candidates[:, 0]), np.minimum(target[1], candidates[:, 1])
    inner = (last - first).clip(0)
    union = (candidates[:, 1] - candidates[:, 0]) + (target[1] - target[0]) - inner
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner.astype(float) / union


def interpolated(precision, recall):
    precision, recall = np.hstack([[0], precision, [0]]), np.hstack([[0], recall, [1]])
    for i in range(len(precision) - 1)[::-1]:
        precision[i] = max(precision[i], precision[i + 1])
    idx = np.where(recall[1:] != recall[:-1])[0] + 1
    return np.sum((recall[idx] - recall[idx - 1]) * precision[idx])


def evaluated(folder, truth, predictions, *arguments):
    paths = folder / "truth.json", folder / "predictions.json"
    for path, content in zip(paths, (truth, predictions), strict=True):
        path.write_text(json.dumps(content))
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, [*map(str, paths), "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


# on a coarse grid: ties in score and tIoU, repeated entries, no length, beyond the video and before it are the rule
moments = st.integers(-2, 24).map(lambda n: n / 2)
labels = st.sampled_from(["a", "b", "c", "Ambiguous"])
segments = st.tuples(moments, st.integers(-1, 12).map(lambda n: n / 2)).map(lambda s: [s[0], s[0] + s[1]])
annotations = st.lists(st.fixed_dictionaries({"label": labels, "segment": segments}), max_size=5)
videos = st.sampled_from(["v0", "v1", "v2", "v3"])
truths = st.dictionaries(
    videos,
    st.fixed_dictionaries(
        {
            "subset": st.sampled_from(["validation", "training"]),
            "duration": st.just(9.0),
            "annotations": annotations,
        }
    ),
).map(lambda database: {"database": database})
detections = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["a", "b", "c", "nobody knows"]),
        "segment": segments,
        "score": st.integers(0, 6).map(lambda n: n / 7),
    }
)
submissions = st.dictionaries(
    st.sampled_from(["v0", "v1", "v2", "v3", "v9"]), st.lists(detections, max_size=12)
).map(lambda results: {"version": "VERSION 1.3", "results": results, "external_data": {}})


def one(entries, found):
    row = {
        "subset": "validation",
        "duration": 9.0,
        "annotations": [{"label": "a", "segment": s} for s in entries],
    }
    rows = [{"label": "a", "segment": s, "score": p} for *s, p in found]
    return {"truth": {"database": {"v0": row}}, "predictions": {"results": {"v0": rows}}}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    truth=truths,
    predictions=submissions,
    tiou=st.sampled_from(sorted(TIOU)),
    blocked=st.sets(videos, max_size=1),
)
@example(
    **one([[1, 2], [1, 2]], [(1, 2, 0.9), (5, 6, 0.8), (1, 2, 0.7)]), tiou="0.5:0.05:0.95", blocked=set()
)
@example(**one([[5, 10], [0, 5]], [(2.5, 7.5, 0.9), (0, 5, 0.8)]), tiou="0.3:0.1:0.7", blocked=set())
@example(
    **one([[1, 2], [20, 30], [-3, -1]], [(20, 30, 0.9), (-3, -1, 0.5)]), tiou="0.3:0.1:0.7", blocked=set()
)
@example(**one([[1, 2], [3, 3]], [(5, 5, 0.9), (1, 2, 0.5)]), tiou="0.3:0.1:0.7", blocked=set())
@example(**one([[1, 2]], []), tiou="0.3:0.1:0.7", blocked=set())
def test_the_command_is_the_official_code(tmp_path, truth, predictions, tiou, blocked):
    counted = [
        row
        for video, entry in truth["database"].items()
        if entry["subset"] == "validation" and video not in blocked
        for row in entry["annotations"]
        if row["label"] != "Ambiguous"
    ]
    if not counted:
        return
    gone = tmp_path / "blocked.json"
    gone.write_text(json.dumps(sorted(blocked)))
    told = evaluated(tmp_path, truth, predictions, "--tiou", tiou, "--blocked", gone)
    wanted = official(truth, predictions, "validation", TIOU[tiou], blocked=blocked)
    assert np.array_equal(told["tiou"], TIOU[tiou])
    assert np.allclose(told["mAP"], wanted, atol=1e-9, rtol=0)
    assert np.isclose(told["average_mAP"], wanted.mean(), atol=1e-9, rtol=0)


def random_set(videos, actions, detections, seed=0):
    """Detections around actions and elsewhere, of scores that are all different."""
    random = np.random.default_rng(seed)
    database, results = {}, {}
    for i in range(videos):
        starts = np.sort(random.uniform(0, 190, actions))
        entries = [
            {"label": f"class {random.integers(20)}", "segment": [s, s + random.uniform(0.5, 10)]}
            for s in starts
        ]
        database[f"v{i}"] = {"subset": "Test", "duration": 200.0, "fps": 30, "annotations": entries}
        rows = []
        for _ in range(detections):
            near = entries[random.integers(actions)]
            start, end = np.array(near["segment"]) + random.normal(0, 2, 2)
            label = near["label"] if random.random() < 0.5 else f"class {random.integers(20)}"
            segment = [start, max(end, start + 0.1)]
            rows.append({"label": label, "segment": segment, "score": random.random()})
        results[f"v{i}"] = rows
    return {"database": database}, {"results": results}


@pytest.mark.parametrize("seed", range(3))
def test_without_ties_numpys_own_sort_says_the_same(tmp_path, seed):
    truth, predictions = random_set(6, 10, 80, seed)
    told = evaluated(tmp_path, truth, predictions, "--tiou", "0.3:0.1:0.7", "--subset", "Test")
    wanted = official(truth, predictions, "Test", TIOU["0.3:0.1:0.7"], kind=None)
    assert np.allclose(told["mAP"], wanted, atol=1e-9, rtol=0)
    assert 0.05 < told["average_mAP"] < 0.95


def test_a_hundred_thousand_detections_take_seconds(tmp_path):
    truth, predictions = random_set(200, 15, 500)
    started = time.process_time()
    evaluated(tmp_path, truth, predictions, "--tiou", "0.5:0.05:0.95", "--subset", "Test")
    assert time.process_time() - started < 30
