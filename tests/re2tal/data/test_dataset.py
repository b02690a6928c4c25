import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from examples.re2tal.data.annotations import Action, AnnotatedVideo, Annotations
from examples.re2tal.data.dataset import Clips, collate
from examples.re2tal.data.video import open_video
from examples.re2tal.errors import Re2TALError
from tests.re2tal.data.conftest import PICTURES, write

RATE = 12
DURATION = PICTURES / RATE
ACTIONS = (Action(1.0, 2.0, "jump"), Action(3.0, 6.0, "run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(("a.mp4", "v_b.mp4", "c.mp4")):
        write(folder / name, seed=i)
    return folder


def data(ids="abc"):
    videos = {i: AnnotatedVideo(i, "training", DURATION, None, None, ACTIONS) for i in ids}
    return Annotations(videos, ("jump", "run"))


def clips(folder, ids="abc", **options):
    settings = {"frames": 24, "positions": 12, "size": (16, 16), "rate": float(RATE), **options}
    return Clips(data(ids), "training", folder, **settings)


def same(one, other):
    return (
        one.video == other.video
        and torch.equal(one.frames, other.frames)
        and torch.equal(one.segments, other.segments)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.mask, other.mask)
        and one.grid == other.grid
    )


def test_windows_show_the_pictures_of_their_time(folder):
    found = clips(folder, size=(64, 64))
    with open_video(folder / "a.mp4") as reader:
        pictures = torch.from_numpy(reader.read(range(PICTURES))).permute(0, 3, 1, 2)
    own = [found[i] for i in range(len(found)) if found.video_of(i) == "a"]
    assert len(own) > 2
    for clip in own:
        start = round(clip.grid.origin * RATE)
        shown = min(24, PICTURES - start)
        assert torch.equal(clip.frames[:shown], pictures[start : start + shown])
        assert clip.mask.sum() == -(-shown // 2)
        for (begin, end), label in zip(clip.segments.double().numpy(), clip.labels, strict=True):
            action = ACTIONS[label]
            times = clip.grid.origin + np.array([begin, end]) * clip.grid.step
            assert times[0] >= action.start - 1e-5
            assert times[1] <= action.end + 1e-5


def test_a_resized_clip_is_the_whole_video(folder):
    clip = clips(folder, sampling="resize", frames=30, positions=15)[0]
    assert clip.mask.all()
    assert torch.allclose(clip.segments, torch.tensor([[1.0, 2.0], [3.0, 6.0]]) / DURATION * 15)
    assert clip.labels.tolist() == [0, 1]


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_clip_depends_on_seed_epoch_and_index_alone(folder, start):
    change = {"crop": 0.5, "flip": True, "jitter": 0.4}
    found = clips(folder, training=True, seed=3, augment=change)
    order = [[(1, 2), (1, 0)], [(2, 1), (1, 1)]]
    workers = {"num_workers": 2, "multiprocessing_context": start} if start else {}
    batches = list(DataLoader(found, batch_sampler=order, collate_fn=collate, **workers))
    again = clips(folder, training=True, seed=3, augment=change)
    torch.manual_seed(99)
    for items, batch in zip(order, batches, strict=True):
        alone = collate([again[item] for item in items])
        assert torch.equal(alone.frames, batch.frames)
        assert alone.grids == batch.grids
    assert same(again[1, 0], again[1, 0])
    assert not all(same(again[1, i], again[2, i]) for i in range(3))
    other = clips(folder, training=True, seed=4, augment=change)
    assert not all(same(again[1, i], other[1, i]) for i in range(3))


def test_augmentation_is_the_same_for_all_pictures_and_leaves_torchs_generator_alone(folder):
    found = clips(
        folder, sampling="resize", training=True, augment={"flip": True, "crop": 0.3, "jitter": 0.9}
    )
    before = torch.get_rng_state()
    still = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(1, 3, 8, 8).expand(5, -1, -1, -1)
    changed = [found.change(still, seed) for seed in range(8)]
    assert all((frames == frames[:1]).all() for frames in changed)
    assert len({frames.numpy().tobytes() for frames in changed}) == 8
    found[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_class_agnostic_labels_are_zero(folder):
    assert clips(folder, sampling="resize", class_agnostic=True)[0].labels.tolist() == [0, 0]


def test_videos_without_actions_are_not_trained_on(folder):
    annotations = data()
    empty = AnnotatedVideo("b", "training", DURATION, None, None, ())
    annotations = Annotations({**annotations.videos, "b": empty}, annotations.classes)
    settings = {"frames": 24, "positions": 12, "size": (16, 16), "rate": 12.0}
    assert len(Clips(annotations, "training", folder, training=True, **settings)) == 2
    assert len(Clips(annotations, "training", folder, **settings).videos) == 3


def test_a_missing_file_is_an_error_unless_that_is_fine(folder):
    with pytest.raises(Re2TALError, match=r"1 of 4 videos .* d; files are called <id>.mp4 or v_<id>.mp4"):
        clips(folder, "abcd")
    assert [video.id for video in clips(folder, "abcd", missing_ok=True).videos] == ["a", "b", "c"]
    with pytest.raises(Re2TALError, match="is no folder"):
        clips(folder / "none")
    with pytest.raises(Re2TALError, match="do not divide"):
        clips(folder, frames=25)


def test_a_torn_file_is_skipped_with_its_name(folder, tmp_path):
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "b.mp4").write_bytes((folder / "v_b.mp4").read_bytes()[:2000])
    training = clips(tmp_path, training=True)
    batch = collate([training[0, 0], training[0, 1], training[0, 2]])
    assert batch.videos == ["a", "c", "c"]
    ((path, reason),) = batch.skipped
    assert path.endswith("b.mp4")
    assert reason
    evaluation = clips(tmp_path)
    torn = [i for i in range(len(evaluation)) if evaluation.video_of(i) == "b"]
    batch = collate([evaluation[i] for i in [*torn, 0]])
    assert batch.videos == ["a"]
    assert len(batch.skipped) == len(torn)
    assert len(collate([evaluation[torn[0]]])) == 0


def test_a_batch_moves_and_travels(folder):
    batch = collate([clips(folder)[0]])
    assert batch.to("cpu").frames.shape == (1, 24, 3, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(batch)).frames, batch.frames)
