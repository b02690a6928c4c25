import json

import pytest
from typer.testing import CliRunner

from examples.re2tal import annotations as command
from examples.re2tal.data.annotations import Action, AnnotationError, read_annotations

ACTIVITYNET = {
    "version": "VERSION 1.3",
    "taxonomy": [{"nodeId": 7, "nodeName": "Juggling", "parentId": 2, "parentName": "Play"}],
    "database": {
        "one": {
            "subset": "training",
            "duration": 82.73,
            "resolution": "320x240",
            "annotations": [
                {"label": "Juggling", "segment": [40.0, 82.73]},
                {"label": "Archery", "segment": [4.1, 31.95]},
            ],
        },
        "two": {"subset": "testing", "duration": 10, "annotations": []},
        "gone": {
            "subset": "training",
            "duration": 5.0,
            "annotations": [{"label": "Archery", "segment": [0, 5]}],
        },
    },
}
ACTIONFORMER = {
    "version": "Thumos14-30fps",
    "database": {
        "video_validation_1": {
            "subset": "Validation",
            "duration": 40.2,
            "fps": 30.0,
            "annotations": [
                {"label": "Diving", "segment": [3.2, 7.9], "segment(frames)": [96.0, 237.0], "label_id": 2},
                {
                    "label": "CliffDiving",
                    "segment": [3.2, 7.9],
                    "segment(frames)": [96.0, 237.0],
                    "label_id": 1,
                },
            ],
        },
        "video_test_1": {"subset": "Test", "duration": 4.0, "fps": 25, "annotations": []},
    },
}
OPENTAD = {
    "database": {
        "video_validation_1": {
            "subset": "training",
            "duration": 40.0,
            "frame": 1200,
            "annotations": [
                {"label": "Diving", "segment": [3.2, 7.9]},
                {"label": "Diving", "segment": [3.2, 7.9]},
                {"label": "Ambiguous", "segment": [10, 12]},
                {"label": "Diving", "segment": [9.0, 8.0]},
                {"label": "Diving", "segment": [41.0, 44.0]},
            ],
        },
        "video_test_1": {"subset": "validation", "duration": 4.0, "frame": 100, "annotations": []},
    }
}


@pytest.fixture
def written(tmp_path):
    def write(data, name="truth.json"):
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return write


def test_activitynet(written):
    found = read_annotations(written(ACTIVITYNET), blocked=written(["gone"], "blocked.json"))
    assert found.classes == ("Archery", "Juggling")
    assert found.version == "VERSION 1.3"
    assert [video.id for video in found.subset("training")] == ["one"]
    assert found.videos["one"].actions == (Action(4.1, 31.95, "Archery"), Action(40.0, 82.73, "Juggling"))
    assert found.videos["one"].fps is None
    assert found.dropped == {"blocked videos": 1}


def test_thumos_after_actionformer_keeps_its_indices_and_two_labels_of_one_segment(written):
    found = read_annotations(written(ACTIONFORMER))
    assert found.classes == ("(class 0)", "CliffDiving", "Diving")
    assert {action.label for action in found.videos["video_validation_1"].actions} == {
        "Diving",
        "CliffDiving",
    }
    assert found.videos["video_test_1"].fps == 25


def test_thumos_after_opentad_is_cleaned_for_training_and_whole_for_evaluation(written, tmp_path):
    names = tmp_path / "category_idx.txt"
    names.write_text("HighJump\nDiving\n")
    found = read_annotations(written(OPENTAD), classes=names)
    assert found.classes == ("HighJump", "Diving")
    assert found.videos["video_validation_1"].fps == 30
    assert found.videos["video_validation_1"].actions == (Action(3.2, 7.9, "Diving"),)
    assert found.dropped == {"Ambiguous segments": 1}
    assert found.faulty == {
        "repeated segments": 1,
        "segments that end before they start": 1,
        "segments outside of their video": 1,
    }
    segments = [(3.2, 7.9), (3.2, 7.9), (9.0, 8.0), (41.0, 44.0)]
    assert [(action.start, action.end) for action in found.videos["video_validation_1"].entries] == segments


def test_a_subset_is_the_one_of_that_very_name(written):
    found = read_annotations(written(OPENTAD))
    with pytest.raises(AnnotationError, match="'training', 'validation'"):
        found.subset("val")


def at(data, *path):
    for key in path[:-1]:
        data = data[key]
    return data, path[-1]


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("database",), [], "database is list"),
        (("database", "one"), 3, r"database\.one is int"),
        (("database", "one", "duration"), "long", r"database\.one\.duration is 'long'"),
        (("database", "one", "duration"), 0, r"database\.one\.duration is 0.0, not a length"),
        (("database", "one", "subset"), None, r"database\.one\.subset is None"),
        (("database", "one", "annotations"), {}, r"database\.one\.annotations is dict"),
        (("database", "one", "annotations", 1, "label"), "", r"one\.annotations\[1\]\.label is ''"),
        (("database", "one", "annotations", 1, "segment"), [1], r"one\.annotations\[1\]\.segment is \[1\]"),
        (
            ("database", "one", "annotations", 1, "segment", 1),
            None,
            r"annotations\[1\]\.segment\[1\] is None",
        ),
        (("database", "one", "annotations", 1, "segment", 1), float("nan"), r"segment\[1\] is nan"),
        (("database", "one", "annotations", 1, "label_id"), "a", r"annotations\[1\]\.label_id is 'a'"),
    ],
)
def test_a_fault_is_told_with_its_place(written, path, value, told):
    data = json.loads(json.dumps(ACTIVITYNET))
    holder, key = at(data, *path)
    holder[key] = value
    with pytest.raises(AnnotationError, match=told):
        read_annotations(written(data))


def test_faults_of_files(written, tmp_path):
    with pytest.raises(AnnotationError, match="No such file"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"database": {')
    with pytest.raises(AnnotationError, match="is not JSON"):
        read_annotations(tmp_path / "torn.json")
    (tmp_path / "names.txt").write_text("Archery\n")
    with pytest.raises(AnnotationError, match="but not 'Juggling'"):
        read_annotations(written(ACTIVITYNET), classes=tmp_path / "names.txt")
    changed = json.loads(json.dumps(ACTIONFORMER))
    changed["database"]["video_validation_1"]["annotations"].append(
        {"label": "Diving", "segment": [9, 10], "label_id": 5}
    )
    with pytest.raises(AnnotationError, match=r"annotations\[2\]\.label_id is 5, but 'Diving' was 2"):
        read_annotations(written(changed))


def test_the_command_tells_what_is_there_and_what_is_wrong(written):
    import typer

    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, [str(written(OPENTAD))])
    assert result.exit_code == 0
    assert "left out: 1 Ambiguous segments" in result.output
    assert "not trained on, yet counted by evaluation: 1 repeated segments" in result.output
    result = CliRunner().invoke(app, [str(written({"database": 1}))])
    assert result.exit_code == 1
    assert "database is int" in result.output
