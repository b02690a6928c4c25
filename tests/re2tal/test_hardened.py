"""What a stranger's video, label or name can do to a training: be skipped, be shown, be refused."""

import json
import os

import av
import numpy as np
import pytest
import torch
import yaml

from examples.re2tal.data.annotations import AnnotationError, read_annotations
from examples.re2tal.data.video import VideoError, open_video
from examples.re2tal.errors import Re2TALError
from examples.re2tal.report.page import write_report
from examples.re2tal.training import checkpoints
from revwire.errors import RevwireError
from tests.helpers.programs import ROOT, python
from tests.re2tal import tiny


def annotated(path, **entry):
    action = {"label": "run", "segment": [1, 4], **entry.pop("action", {})}
    video = {"subset": "validation", "duration": 10.0, "annotations": [action], **entry}
    path.write_text(json.dumps({"database": {"v": video}}))
    return path


def test_a_codec_that_this_ffmpeg_does_not_know(tmp_path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i * 9, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    content = path.read_bytes()
    known = b"V_MPEG4/ISO/ASP"
    assert known in content
    path.write_bytes(content.replace(known, b"V_NEWCODEC/2030"))
    with pytest.raises(VideoError, match="does not know its codec"), open_video(path):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_video_and_no_annotation_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VideoError, match="it is no regular file"):
        open_video(tmp_path / "pipe")
    with pytest.raises(AnnotationError, match="is no regular file"):
        read_annotations(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"action": {"label_id": 500_000_000}}, "at most 100000 classes"),
        ({"duration": 10**400}, "not a number below"),
        ({"fps": 1e300}, "not a number below"),
        ({"action": {"segment": [0, 10**400]}}, "not a number below"),
    ],
)
def test_numbers_that_would_fill_the_memory(tmp_path, entry, words):
    with pytest.raises(AnnotationError, match=words):
        read_annotations(annotated(tmp_path / "a.json", **entry))


def test_json_nested_without_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(AnnotationError, match="is not JSON"):
        read_annotations(path)


@pytest.mark.parametrize("label", ["<!--<script>", "</script><script>alert(1)</script>", "[/red]"])
def test_a_label_stays_within_its_text_on_the_page(tmp_path, label):
    truth = read_annotations(annotated(tmp_path / "a.json", action={"label": label}))
    write_report(tmp_path / "r.html", truth, {}, subset="validation", tiou=np.array([0.5]))
    page = (tmp_path / "r.html").read_text("utf-8")
    data = page[page.index('type="application/json"') :]
    data = data[data.index(">") + 1 : data.index("</script")]
    assert "<" not in data
    assert label in json.loads(data)["classes"]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, 1, {"w": torch.ones(10)}, keep=2)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    real = torch.save
    monkeypatch.setattr(checkpoints.torch, "save", lambda state, file: real(state, Full()))
    with pytest.raises((Re2TALError, RevwireError), match=r"No space left on device|disk is full"):
        checkpoints.save(tmp_path, 2, {"w": torch.ones(10)}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_brackets_in_a_folders_name_end_no_training(tmp_path):
    folder = tmp_path / "videos[/old]"
    folder.mkdir(parents=True)
    tiny.data(folder, 4, 2)
    bad = min((folder / "videos").glob("training*"))
    bad.write_bytes(bad.read_bytes()[:300])
    settings = tiny.settings(folder, tmp_path / "out", optim={"epochs": 2})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    done = python(
        "-m", "examples.re2tal.train", tmp_path / "c.yaml", "--device", "cpu", cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "videos[/old]" in done.stderr + done.stdout
