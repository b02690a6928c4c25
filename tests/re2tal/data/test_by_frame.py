"""Sampling by numbers of pictures, against the rules written out one picture at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
from examples.re2tal.data.by_frame import ByFrame
from examples.re2tal.data.dataset import Clips
from examples.re2tal.data.video import open_video, scaled
from examples.re2tal.errors import Re2TALError
from tests.re2tal.data.conftest import write

FPS = 25.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    write(folder / "a.mp4", size=(48, 64))
    return folder


def literal_windows(count, stride, each, size, overlap):
    """(first position, pictures, positions that count) of each window."""
    places = [i for i in range(count) if i % stride == 0]  # a picture of each position
    shown = [i for i in range(count) if i % (stride // each) == 0]
    hop = int(size * (1 - overlap))
    found = []
    for number in range(max(1, len(places) // hop)):
        first = number * hop
        beyond = first + size > len(places)
        if beyond:
            first = max(0, len(places) - size)
        pictures = [i for i in shown if first * stride <= i][: size * each]
        found.append((first, pictures + pictures[-1:] * (size * each - len(pictures)), len(pictures) // each))
        if beyond:
            break
    return found


@given(
    count=st.integers(1, 900),
    each=st.integers(1, 3),
    skip=st.integers(1, 3),
    size=st.integers(2, 40),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_windows_are_those_of_the_rules(count, each, skip, size, overlap):
    stride = each * skip
    views = ByFrame(size * each, size, stride, overlap).windows(count / FPS, count)
    wanted = literal_windows(count, stride, each, size, overlap)
    assert len(views) == len(wanted)
    for view, (first, pictures, valid) in zip(views, wanted, strict=True):
        assert view.indices.tolist() == pictures
        assert view.valid == valid
        assert view.grid.seconds(np.array([0.0, 1.0])) == pytest.approx(
            np.clip([first * stride / FPS, (first + 1) * stride / FPS], 0, count / FPS)
        )
        assert view.grid.positions(view.grid.moments(np.array([3.0]))) == pytest.approx([3.0])


def test_half_overlapping_windows_repeat_the_last_and_reach_the_end():
    views = ByFrame(8, 4, 2, 0.5).windows(10.0, 16)  # eight positions: four half windows
    assert [int(view.grid.origin) for view in views] == [0, 4, 8, 8]
    assert max(views[-1].indices) == 15


@given(count=st.integers(1, 5000), frames=st.sampled_from([4, 16, 96]))
def test_a_whole_video_is_shown_at_the_middles_of_equal_parts(count, frames):
    view = ByFrame(frames, frames // 2).whole(count / FPS, count)
    middles = (np.arange(frames) + 0.5) * count / frames - 0.5
    assert np.abs(view.indices - np.clip(middles, 0, count - 1)).max() <= 0.5 + 1e-9
    assert view.indices.min() >= 0
    assert view.indices.max() < count
    assert view.valid == frames // 2
    assert view.grid.seconds(np.array([0.0, frames / 2])) == pytest.approx([0.0, count / FPS])


@given(count=st.integers(4, 400), seed=st.integers(0, 99), start=st.floats(0, 10), length=st.floats(0.2, 4))
def test_a_part_for_training_holds_most_of_an_action(count, seed, start, length):
    duration = count / FPS
    segments = np.clip([[start, start + length]], 0, duration)
    sampler = ByFrame(32, 16, 4)
    view, kept, inside = sampler.part(duration, count, segments, np.random.default_rng(seed))
    every = np.arange(0, count, 2)
    shown = view.indices[: np.flatnonzero(view.indices == view.indices.max())[0] + 1]
    first = np.searchsorted(every, shown[0])
    assert np.array_equal(shown, every[first : first + len(shown)])
    assert view.valid == len(shown) // 2
    assert len(shown) >= min(32, round(0.9 * len(every)))
    if len(kept):  # in whole frames of the video, and cut to what is shown
        frames = np.trunc(segments / duration * count)
        wanted = (frames - shown[0]) / 4
        assert np.all(inside >= np.minimum(wanted, inside) - 1e-9)
        assert (inside[0, 1] - inside[0, 0]) >= 0.75 * (wanted[0, 1] - wanted[0, 0]) - 1e-9


def test_clips_by_frame_show_those_pictures(folder):
    with open_video(folder / "a.mp4") as reader:
        count, duration = len(reader), reader.duration
        own = reader.read(range(count), (16, 16))
    actions = (Action(1.0, 2.0, "wave"), Action(3.0, 3.02, "jump"))
    videos = {"a": AnnotatedVideo("a", "s", duration, None, count, actions)}
    annotations = Annotations(videos, ("wave", "jump"))
    given = {"frames": 16, "positions": 8, "size": (16, 16), "by": "frame", "stride": 4}
    for clip, view in zip(
        Clips(annotations, "s", folder, **given), ByFrame(16, 8, 4).windows(duration, count), strict=True
    ):
        assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), own[view.indices])
        assert int(clip.mask.sum()) == view.valid
    whole = Clips(annotations, "s", folder, sampling="resize", training=True, shortest=0.01, **given)[0]
    assert whole.labels.tolist() == [0]  # the other is too short
    assert np.array_equal(
        whole.frames.permute(0, 2, 3, 1).numpy(), own[ByFrame(16, 8).whole(duration, count).indices]
    )
    part = Clips(annotations, "s", folder, training=True, **given)[0]
    assert part.frames.shape == (16, 3, 16, 16)


def test_windows_by_frame_need_the_number_of_frames(folder):
    annotations = Annotations({"a": AnnotatedVideo("a", "s", 5.0, None, None, ())}, ("wave",))
    with pytest.raises(
        Re2TALError, match=r"annotation of a has neither frame nor fps, which clip\.by=frame needs"
    ):
        Clips(annotations, "s", folder, frames=16, positions=8, size=(16, 16), by="frame")
    with pytest.raises(Re2TALError, match=r"clip\.stride \(3\) is no multiple of the 2 pictures"):
        ByFrame(16, 8, 3)
    with pytest.raises(Re2TALError, match="less than 1"):
        ByFrame(16, 8, 4, 1.0)


@pytest.mark.parametrize(
    ("own", "size", "wanted"),
    [
        ((360, 640), 256, (256, 455)),
        ((640, 360), 256, (455, 256)),
        ((10, 20), None, (10, 20)),
        ((10, 20), (7, 9), (7, 9)),
    ],
)
def test_the_short_side_is_scaled_in_proportion(own, size, wanted):
    assert scaled(own, size) == wanted


def test_cropped_pictures_keep_their_proportions(folder):
    with open_video(folder / "a.mp4") as reader:
        whole = reader.read([1], 12)  # at 0.16 s, the middle of the first of 16 parts of 5 s
        own = reader.read([1])
    height, width = own.shape[1:3]
    assert min(whole.shape[1:3]) == 12
    assert abs(whole.shape[1] / whole.shape[2] - height / width) < 0.1
    annotations = Annotations(
        {"a": AnnotatedVideo("a", "s", 5.0, FPS, None, (Action(1, 2, "wave"),))}, ("wave",)
    )
    given = {"frames": 16, "positions": 8, "size": (12, 12), "fit": "crop", "sampling": "resize"}
    shown = Clips(annotations, "s", folder, **given)[0].frames[0].permute(1, 2, 0).numpy()
    top, left = (whole.shape[1] - 12) // 2, (whole.shape[2] - 12) // 2
    assert np.array_equal(shown, whole[0, top : top + 12, left : left + 12])
    augment = {"crop": 0.5, "flip": True, "jitter": 0.5, "hue": 0.1, "rand_augment": 2}
    changed = Clips(annotations, "s", folder, training=True, short_side=20, augment=augment, **given)[0]
    assert changed.frames.shape == (16, 3, 12, 12)
