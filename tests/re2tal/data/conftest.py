"""Small video files of every kind: constant rate, varying rate, cut by an edit list."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest

PICTURES = 90
SIDE = 64


def pictures(count=PICTURES, seed=0):
    """Pictures that are all unlike one another."""
    random = np.random.default_rng(seed)
    for i in range(count):
        picture = np.full((SIDE, SIDE, 3), (37 * i) % 256, np.uint8)
        picture[: i % SIDE] = random.integers(0, 255, 3)
        yield picture


def write(
    path,
    times=None,
    rate=12,
    count=PICTURES,
    seed=0,
    size=(SIDE, SIDE),
    pixels="yuv420p",
    title="",
    **options,
):
    """Write an h264 file whose pictures are shown at `times` milliseconds, or at a constant rate."""
    with av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.options = {"crf": "23", "g": "25", "bf": "2"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures(count, seed)):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture[: size[0], : size[1]]), format="rgb24"
            )
            frame.pts = i if times is None else int(times[i])
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source, path, seconds):
    """Copy packets from the key frame before `seconds` on; an edit list hides what is shown before."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        start = round(seconds / stream.time_base)
        packets = [packet for packet in read.demux(stream) if packet.pts is not None]
        first = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start)
        for packet in packets[first:]:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = copy
            written.mux(packet)
    return path


def turned(source, path, quarters):
    """A copy of an mp4 whose header asks players to turn the pictures to the right, as phones write it."""
    one, data = 1 << 16, bytearray(source.read_bytes())
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4]
    place = data.index(b"tkhd") + 44  # of the matrix, in the track's header
    struct.pack_into(">5i", data, place, cosine * one, sine * one, 0, -sine * one, cosine * one)
    path.write_bytes(data)
    return path


def decoded(path):
    """All pictures of a file, read from its beginning to its end."""
    with av.open(str(path), metadata_errors="replace") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    constant = write(folder / "constant.mp4")
    return {
        "constant rate": constant,
        "varying rate": write(folder / "varying.mp4", times=np.cumsum(random.integers(20, 200, PICTURES))),
        "edit list": cut(constant, folder / "cut.mp4", 3.0),
    }
