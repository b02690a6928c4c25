import pytest

from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
from examples.re2tal.evaluation.diagnosis import KINDS, profile
from examples.re2tal.evaluation.postprocess import Detections


def one(actions, detections):
    video = AnnotatedVideo("v", "s", 100.0, None, None, tuple(Action(*a) for a in actions))
    rows = Detections.of([d[:2] for d in detections], [d[2] for d in detections], [d[3] for d in detections])
    return Annotations({"v": video}, ("a", "b")), {"v": rows}


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((10, 20, 0.9, 0), "true positive"),
        ((40, 50, 0.9, 0), "wrong label"),
        ((10, 13, 0.9, 0), "localization"),
        ((40, 43, 0.9, 0), "confusion"),
        ((80, 90, 0.9, 0), "background"),
    ],
)
def test_a_detection_is_of_the_kind_it_is(detection, kind):
    truth, results = one([(10, 20, "a"), (40, 50, "b")], [detection])
    found = profile(truth, results, subset="s")
    assert found[0, KINDS.index(kind)] == 1
    assert found[1:].sum() == 0


def test_a_second_detection_is_a_duplicate_in_the_second_rank():
    truth, results = one([(10, 20, "a")], [(10, 20, 0.9, 0), (10, 19, 0.8, 0)])
    found = profile(truth, results, subset="s")
    assert found[0, KINDS.index("true positive")] == 1
    assert found[1, KINDS.index("duplicate")] == 1


def test_what_is_found_in_a_video_without_actions_is_background():
    truth, results = one([(10, 20, "a")], [])
    found = profile(truth, {**results, "other": Detections.of([(1, 2)], [0.5], [0])}, subset="s")
    assert found[0, KINDS.index("background")] == 1
