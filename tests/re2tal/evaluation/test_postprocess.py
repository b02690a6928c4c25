import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.re2tal.errors import Re2TALError
from examples.re2tal.evaluation.postprocess import (
    Detections,
    gather,
    joined,
    read_submission,
    read_video_classes,
    soft_nms,
    tiou,
    vote,
    with_video_classes,
    write_submission,
)


def overlap(one, other):
    inner = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = (one[1] - one[0]) + (other[1] - other[0]) - inner
    return inner / union if union > 0 else 0.0


def literal_soft_nms(rows, sigma, min_score):
    """The references' compiled loop, on [start, end, score, label], which says what happens to equal scores."""
    rows, i = [list(row) for row in rows if row[2] >= min_score], 0
    while i < len(rows):
        best = max(range(i, len(rows)), key=lambda j: rows[j][2])  # the first of equal ones
        rows[i], rows[best] = rows[best], rows[i]
        j = i + 1
        fresh = set(range(j, len(rows)))
        while j < len(rows):
            if j in fresh:
                rows[j][2] *= math.exp(-(overlap(rows[i], rows[j]) ** 2) / sigma)
                fresh.discard(j)
            if rows[j][2] < min_score:
                rows[j] = rows[-1]
                if len(rows) - 1 in fresh:
                    fresh.discard(len(rows) - 1)
                    fresh.add(j)
                rows.pop()
            else:
                j += 1
        i += 1
    return rows


detections = st.lists(
    st.tuples(st.floats(0, 50), st.floats(0, 20), st.floats(0.0005, 1), st.integers(0, 2)), max_size=25
)


def of(drawn):
    return Detections.of(
        [(s, s + n) for s, n, _, _ in drawn], [p for *_, p, _ in drawn], [k for *_, k in drawn]
    )


@settings(max_examples=100)
@given(
    detections, st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0.001, 0.2]), st.booleans(), st.booleans()
)
def test_soft_nms_is_the_literal_loop(drawn, sigma, min_score, multiclass, ties):
    rows = [(s, s + n, round(p, 1) if ties else p, k) for s, n, p, k in drawn]
    windows = [Detections.of([row[:2]], [row[2]], [row[3]]) for row in rows]
    found = soft_nms(joined(windows), sigma=sigma, min_score=min_score, multiclass=multiclass)
    wanted = []
    for label in {row[3] for row in rows} if multiclass else {None}:
        wanted += literal_soft_nms([r for r in rows if label in {None, r[3]}], sigma, min_score)
    assert sorted(zip(found.segments.tolist(), found.labels.tolist(), strict=True)) == sorted(
        ([start, end], label) for start, end, _, label in wanted
    )
    ours = sorted((*s, p) for s, p in zip(found.segments.tolist(), found.scores.tolist(), strict=True))
    assert np.allclose(ours, sorted((a, b, p) for a, b, p, _ in wanted), atol=1e-9)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_soft_nms_keeps_the_best_and_changes_nothing_that_it_was_given():
    drawn = [(0.0, 1.0, 0.9, 0), (0.1, 1.0, 0.8, 0), (30.0, 2.0, 0.5, 0)]
    before = of(drawn)
    scores = before.scores.copy()
    found = soft_nms(before, limit=2)
    assert np.array_equal(before.scores, scores)
    assert found.scores.tolist()[:2] == [0.9, 0.5]


@given(detections.filter(bool))
def test_tiou_is_that_of_pairs(drawn):
    segments = of(drawn).segments
    table = tiou(segments[:, None], segments[None])
    for i, one in enumerate(segments):
        for j, other in enumerate(segments):
            assert math.isclose(table[i, j], overlap(one, other), abs_tol=1e-12)


@pytest.mark.parametrize("weight", ["score*iou", "score"])
def test_votes_are_a_weighted_mean(weight):
    random = np.random.default_rng(0)
    starts, lengths = random.uniform(0, 5, 30), random.uniform(1, 3, 30)
    before = Detections.of(np.stack([starts, starts + lengths], axis=1), random.random(30), np.zeros(30))
    after = soft_nms(before)
    found = vote(after, before, threshold=0.6, weight=weight)
    for old, new in zip(after.segments, found.segments, strict=True):
        voters = [(overlap(old, s), p, s) for s, p in zip(before.segments, before.scores, strict=True)]
        weights = [(p * o if weight == "score*iou" else p, s) for o, p, s in voters if o >= 0.6]
        total = sum(w for w, _ in weights)
        assert np.allclose(new, sum(w * s for w, s in weights) / total)
    with pytest.raises(Re2TALError, match="score\\*iou or score"):
        vote(after, before, weight="iou")


def test_video_classes_take_the_place_of_action():
    found = with_video_classes(of([(0.0, 1.0, 0.5, 0), (2.0, 1.0, 0.4, 0)]), np.array([0.1, 0.9, 0.3]), top=2)
    assert found.labels.tolist() == [1, 1, 2, 2]
    assert np.allclose(found.scores, [0.45, 0.36, 0.15, 0.12])
    rooted = with_video_classes(of([(0.0, 1.0, 0.5, 0)]), np.array([0.1, 0.9]), top=1, rule="sqrt")
    assert np.allclose(rooted.scores, [math.sqrt(0.45)])
    with pytest.raises(Re2TALError, match="product or sqrt"):
        with_video_classes(of([]), np.array([0.1]), rule="sum")


def test_video_classes_come_in_the_order_of_the_classes(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"results": {"x": [0.1, 0.2, 0.7]}, "class": ["c", "a", "b"]}))
    assert read_video_classes(path, ["a", "b", "c"])["x"].tolist() == [0.2, 0.7, 0.1]
    with pytest.raises(Re2TALError, match="no scores of d"):
        read_video_classes(path, ["a", "d"])
    path.write_text(json.dumps({"results": {"x": [0.1, 0.2]}, "class": ["c", "a", "b"]}))
    with pytest.raises(Re2TALError, match=r"results\.x is no list of a score for each of 3 classes"):
        read_video_classes(path, ["a"])


def test_windows_are_put_together():
    assert len(gather([])) == 0
    found = gather([of([(0.0, 1.0, 0.2, 0)]), of([(5.0, 1.0, 0.9, 1)]), of([])])
    assert found.scores.tolist() == [0.9, 0.2]
    assert found.labels.tolist() == [1, 0]


@given(detections)
def test_a_submission_comes_back_as_it_was(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("submission") / "predictions.json"
    before = of(drawn)
    write_submission(path, {"v": before}, ["a", "b", "c"])
    found, unknown = read_submission(path, ["a", "b", "c"])
    assert unknown == 0
    assert np.array_equal(found["v"].segments, before.segments)
    assert np.array_equal(found["v"].scores, before.scores)
    assert json.loads(path.read_text()).keys() == {"version", "results", "external_data"}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"label": "a", "segment": [1]}, r"results\.v\[1\] is"),
        ({"label": "a", "segment": [1, 2]}, r"results\.v\[1\] is"),
        ({"label": "a", "segment": [1, 2], "score": float("inf")}, "not finite"),
        (5, r"results\.v\[1\] is 5"),
    ],
)
def test_a_fault_of_a_submission_is_told_with_its_place(tmp_path, entry, told):
    path = tmp_path / "predictions.json"
    good = {"label": "a", "segment": [1, 2], "score": 0.5}
    path.write_text(json.dumps({"results": {"v": [good, entry]}}))
    with pytest.raises(Re2TALError, match=told):
        read_submission(path, ["a"])


def test_a_video_has_a_list_of_detections(tmp_path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"results": {"v": None}}))
    with pytest.raises(Re2TALError, match=r"results\.v is NoneType, not a list"):
        read_submission(path, ["a"])


def test_unknown_labels_are_counted(tmp_path):
    path = tmp_path / "predictions.json"
    entries = [{"label": k, "segment": [1, 2], "score": 0.5} for k in "aab"]
    path.write_text(json.dumps({"results": {"v": entries}}))
    found, unknown = read_submission(path, ["a"])
    assert len(found["v"]) == 2
    assert unknown == 1
