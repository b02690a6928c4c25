import pickle
import random

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.re2tal.data.video import VideoError, open_video, shown_at
from examples.re2tal.errors import Re2TALError
from tests.re2tal.data.conftest import PICTURES, decoded, turned, write

KINDS = ["constant rate", "varying rate", "edit list"]


@pytest.fixture(scope="session")
def sequential(files):
    return {kind: decoded(path) for kind, path in files.items()}


def torchcodec_loads():
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"")
    except ImportError:
        return False
    except (RuntimeError, ValueError) as error:
        return "libtorchcodec" not in str(error)
    return True


DECODERS = [
    "pyav",
    pytest.param(
        "torchcodec",
        marks=pytest.mark.skipif(not torchcodec_loads(), reason="torchcodec finds no FFmpeg libraries"),
    ),
]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_that_of_a_sequential_reading(files, sequential, kind, decoder):
    with open_video(files[kind], decoder=decoder) as reader:
        assert len(reader) == len(sequential[kind])
        assert np.array_equal(reader.read(range(len(reader))), np.stack(sequential[kind]))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pictures_in_any_order(files, sequential, kind, decoder, data):
    wanted = data.draw(st.lists(st.integers(0, len(sequential[kind]) - 1), max_size=12))
    with open_video(files[kind], decoder=decoder) as reader:
        for indices in (wanted, wanted[::-1]):
            found = reader.read(indices)
            assert len(found) == len(indices)
            for picture, index in zip(found, indices, strict=True):
                assert np.array_equal(picture, sequential[kind][index])


def test_an_edit_list_hides_pictures(files, sequential):
    with av.open(str(files["edit list"])) as container:
        hidden = sum(packet.is_discard for packet in container.demux(video=0) if packet.size)
    assert hidden > 0
    assert len(sequential["edit list"]) == PICTURES - 3 * 12


def test_times_are_those_of_the_file(files):
    with open_video(files["varying rate"]) as reader:
        milliseconds = np.cumsum(np.random.default_rng(0).integers(20, 200, PICTURES))
        assert np.allclose(reader.times, (milliseconds - milliseconds[0]) / 1000, atol=1e-3)
        assert np.isclose(reader.fps, PICTURES / reader.duration)
    with open_video(files["constant rate"]) as reader:
        assert np.allclose(reader.times, np.arange(PICTURES) / 12)
        assert np.isclose(reader.duration, PICTURES / 12)


def test_the_picture_of_a_moment_is_the_one_on_show():
    times = np.array([0.0, 0.1, 0.5])
    moments = np.array([-1.0, 0.0, 0.05, 0.1 - 1e-9, 0.3, 0.5, 9.0])
    assert shown_at(times, moments).tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_pictures_are_turned_as_a_player_turns_them(tmp_path, decoder, quarters):
    upright = write(tmp_path / "upright.mp4", size=(48, 64))
    on_its_side = turned(upright, tmp_path / "turned.mp4", quarters)
    wanted = np.rot90(np.stack(decoded(upright))[[80, 3]], -quarters, axes=(1, 2))
    with open_video(on_its_side, decoder=decoder) as reader:
        assert np.array_equal(reader.read([80, 3]), wanted)
        small = reader.read([80, 3], (8, 16)).astype(float)
    blocks = wanted.reshape(2, 8, -1, 16, wanted.shape[2] // 16, 3).mean(axis=(2, 4))
    assert np.abs(small - blocks).mean() < 4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("size", "pixels"), [((47, 61), "yuv444p"), ((2, 64), "yuv420p"), ((48, 64), "yuv420p10le")]
)
def test_pictures_of_any_size_and_depth(tmp_path, decoder, size, pixels):
    path = write(tmp_path / "odd.mp4", size=size, pixels=pixels)
    with open_video(path, decoder=decoder) as reader:
        found, wanted = reader.read([70, 7]).astype(int), np.stack(decoded(path))[[70, 7]]
        # of ten bits each FFmpeg makes eight in its own way
        assert np.abs(found - wanted).mean() <= (1 if "10" in pixels else 0)
        assert reader.read([5], (32, 32)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_pictures_are_scaled(files, decoder):
    with open_video(files["constant rate"], decoder=decoder) as reader:
        whole = reader.read([0, 40]).astype(float)
        small = reader.read([0, 40], (16, 32)).astype(float)
    assert small.shape == (2, 16, 32, 3)
    blocks = whole.reshape(2, 16, 4, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - blocks).mean() < 4


class Counting:
    """A container that counts the frames that it decodes."""

    def __init__(self, container):
        self._container, self.count = container, 0
        self.seek, self.close = container.seek, container.close

    def decode(self, stream):
        for frame in self._container.decode(stream):
            self.count += 1
            yield frame


def test_little_is_decoded_for_little(files):
    with open_video(files["constant rate"]) as reader:
        counting = reader._container = Counting(reader._container)
        reader.read([80, 80, 81])
        group = 25  # pictures from one key frame to the next, at most
        assert 2 <= counting.count <= group + 2
        counting.count = 0
        reader.read(range(10))
        assert counting.count <= 12


def test_a_title_in_another_alphabet_is_no_fault(tmp_path):
    path = write(tmp_path / "titled.mp4", count=10, title="Grüße")
    path.write_bytes(path.read_bytes().replace("Grüße".encode(), "Grüße  ".encode("latin-1")))
    with open_video(path) as reader:
        assert np.array_equal(reader.read(range(10)), np.stack(list(decoded(path))))


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "stale.mp4", count=10)

    def stale(*_args, **_options):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(av, "open", stale)
    with pytest.raises(VideoError, match=r"stale\.mp4: Stale file handle"):
        open_video(path)


def test_what_is_no_video_says_so(tmp_path):
    with pytest.raises(VideoError, match=r"none\.mp4: there is no such file"):
        open_video(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"empty\.mp4: it is empty"):
        open_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_bytes(b"hello" * 1000)
    with pytest.raises(VideoError, match=r"text\.mp4: Invalid data"):
        open_video(tmp_path / "text.mp4")
    with pytest.raises(Re2TALError, match="choose one of pyav, torchcodec"):
        open_video(tmp_path / "text.mp4", decoder="decord")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_file_that_was_cut_off_says_so(tmp_path, part):
    for name, options in (("end", {}), ("front", {"movflags": "faststart"})):
        path = write(tmp_path / f"{name}.mp4", **options)
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(VideoError, match=name):
            open_video(path)


def test_damaged_bytes_never_crash(files, tmp_path):
    whole = files["constant rate"].read_bytes()
    dice = random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(damaged)
        try:
            with open_video(path) as reader:
                reader.read(range(0, len(reader), 7))
        except VideoError:
            pass


def test_there_is_no_picture_beyond_the_last(files):
    with open_video(files["constant rate"]) as reader:
        for index in (-1, PICTURES):
            with pytest.raises(VideoError, match=f"pictures 0 to {PICTURES - 1}"):
                reader.read([index])
        assert reader.read([]).shape == (0, 64, 64, 3)
        assert reader.read([], (8, 6)).shape == (0, 8, 6, 3)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "it is torn")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "it is torn", "a.mp4: it is torn")
