"""Pictures out of video files: exactly the ones asked for, and no more decoding than they need.

A reader first lists the time of every picture that a player would show, by reading the file's packets without decoding
them (milliseconds). An index then means the same picture whether the frame rate is constant or varies, and also in
files that an editor has cut by an edit list. To read some pictures, it goes to the key frame before each and decodes
on from there.

PyAV is the decoder: its wheel brings FFmpeg. torchcodec can take its place where FFmpeg's libraries are installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from examples.re2tal.errors import Re2TALError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from av.container import InputContainer
    from numpy.typing import NDArray
    from typing_extensions import Self

DECODERS = ("pyav", "torchcodec")

_WHOLE = 0.98
"""A file that ends before this part of the length it declares was cut off."""

_TICK = 1e-6
"""Seconds: a moment that rounding has left this little before a picture means that picture."""


class VideoError(Re2TALError):
    """A video file cannot be read: `path`, and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


class VideoReader(ABC):
    """An open video file, for use in a `with` statement.

    Attributes:
        times: (pictures,) When each picture is shown, in seconds from the first.
        duration: Seconds, the last picture's own time included.
        fps: Pictures a second, on average.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._index = _scan(self._path)
        self.times, self.duration = self._index.times, self._index.duration
        self.fps = len(self.times) / self.duration

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.times)

    def read(
        self, indices: Sequence[int] | NDArray[np.intp], size: tuple[int, int] | int | None = None
    ) -> NDArray[np.uint8]:
        """Some pictures, (indices, height, width, 3), RGB, in the order asked for, repeated where an index is.

        Args:
            indices: Which pictures.
            size: Height and width to scale them to, or what to scale their short side to; their own if not given.

        Raises:
            VideoError: there is no such picture, or it cannot be decoded.
        """
        chosen = np.asarray(indices, dtype=np.intp)
        if chosen.ndim != 1 or np.any((chosen < 0) | (chosen >= len(self))):
            raise VideoError(
                self._path, f"it has the pictures 0 to {len(self) - 1}; some asked for are none of them"
            )
        return self._read(chosen, size)

    @abstractmethod
    def _read(self, chosen: NDArray[np.intp], size: tuple[int, int] | int | None) -> NDArray[np.uint8]: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the file."""
        self.close()


def open_video(path: str | Path, *, decoder: str = "pyav", threads: int = 1) -> VideoReader:
    """Open a video file. An open reader belongs to the process that opened it.

    Args:
        path: The file.
        decoder: One of `DECODERS`.
        threads: How many threads decode.

    Raises:
        VideoError: the file is missing, is no video, or was cut off.
        Re2TALError: there is no such decoder, or it is not installed.
    """
    if decoder == "pyav":
        return PyAVReader(path, threads)
    if decoder == "torchcodec":
        return TorchCodecReader(path, threads)
    raise Re2TALError(f"there is no decoder {decoder!r}; choose one of {', '.join(DECODERS)}")


def shown_at(times: NDArray[np.float64], moments: NDArray[np.float64]) -> NDArray[np.intp]:
    """Indices of the pictures that are shown at some moments; the first before the video, the last after it."""
    return np.clip(np.searchsorted(times, moments + _TICK, side="right") - 1, 0, len(times) - 1)


def scaled(own: tuple[int, int], size: tuple[int, int] | int | None) -> tuple[int, int]:
    """Height and width of pictures of `own` size, scaled to a size or, in proportion, to a short side."""
    if isinstance(size, int):
        height, width = (int(side * size / min(own) + 0.5) for side in own)
        return height, width
    return size or own


@dataclass(frozen=True)
class _Index:
    """What the packets of a file tell.

    Attributes:
        pts: (pictures,) Presentation time stamps, ascending.
        keys: Those of key frames, ascending; a cut file may begin before the first picture that is shown.
        base: Seconds of one unit of them.
        last: Units that the last picture is shown for.
    """

    pts: NDArray[np.int64]
    keys: NDArray[np.int64]
    base: float
    last: int

    @property
    def times(self) -> NDArray[np.float64]:
        return (self.pts - self.pts[0]) * self.base

    @property
    def duration(self) -> float:
        return float((self.pts[-1] - self.pts[0] + self.last) * self.base)


class PyAVReader(VideoReader):
    """Pictures by PyAV; scaling is done while converting to RGB, which costs next to nothing."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        super().__init__(path)
        with _named(self._path):
            self._container = _opened(self._path)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = threads
        self._reformatter = VideoReformatter()

    def _read(self, chosen: NDArray[np.intp], size: tuple[int, int] | int | None) -> NDArray[np.uint8]:
        context = self._stream.codec_context
        own = context.height, context.width
        out = np.empty((0, *scaled(own, size), 3), dtype=np.uint8)
        wanted, places = np.unique(chosen, return_inverse=True)
        with _named(self._path):
            for number, frame in enumerate(self._frames(self._index.pts[wanted])):
                # phones store pictures lying on their side, and the rotation with them
                turns = round(frame.rotation / 90) % 4
                if not number:
                    # one array for all: fresh arrays for every picture cost more in page faults than the decoding
                    shape = scaled(own[::-1] if turns % 2 else own, size)
                    out = np.empty((len(chosen), *shape, 3), dtype=np.uint8)
                picture = self._rgb(frame, turns, out.shape[1:3])
                for place in np.flatnonzero(places == number):
                    out[place] = picture
        return out

    def _rgb(self, frame: av.VideoFrame, turns: int, size: tuple[int, ...]) -> NDArray[np.uint8]:
        """A frame as it is shown, scaled to a size, after so many quarter turns to the left."""
        height, width = size[::-1] if turns % 2 else size
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24")
        plane = rgb.planes[0]
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        return np.rot90(rows[:height, : 3 * width].reshape(height, width, 3), turns)

    def _frames(self, wanted: NDArray[np.int64]) -> Iterator[av.VideoFrame]:
        """The frames of ascending time stamps."""
        decoded: Iterator[av.VideoFrame] = iter(())
        now = None  # the time stamp that decoding has come to
        for pts in wanted:
            key = int(np.searchsorted(self._index.keys, pts, side="right")) - 1
            if now is None or (key >= 0 and self._index.keys[key] > now):
                decoded, frame = self._seek(pts, key)
            else:
                frame = next((f for f in decoded if f.pts is not None and f.pts >= pts), None)
            if frame is None or frame.pts != pts:
                raise VideoError(
                    self._path, f"the picture at {pts * self._index.base:.3f} s cannot be decoded"
                )
            if frame.is_corrupt:
                raise VideoError(self._path, f"the picture at {pts * self._index.base:.3f} s is damaged")
            now = int(pts)
            yield frame

    def _seek(self, pts: int, key: int) -> tuple[Iterator[av.VideoFrame], av.VideoFrame | None]:
        """Decode from a key frame to a time stamp; from an earlier one where the container lands too late."""
        while True:
            target = int(self._index.keys[key]) if key >= 0 else int(self._index.pts[0])
            self._container.seek(target, stream=self._stream)
            decoded = self._container.decode(self._stream)
            frame = next((f for f in decoded if f.pts is not None and f.pts >= pts), None)
            if key <= 0 or (frame is not None and frame.pts == pts):
                return decoded, frame
            key -= 1

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()


class TorchCodecReader(VideoReader):
    """Pictures by torchcodec in its exact mode: the approximate one shows other pictures where the rate varies."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        super().__init__(path)
        try:
            from torchcodec.decoders import VideoDecoder

            self._decoder: Any = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=threads)
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if isinstance(error, ImportError) or "libtorchcodec" in reason:
                raise Re2TALError(
                    f"torchcodec does not load ({reason}); it needs FFmpeg's libraries, or choose the decoder pyav"
                ) from None
            raise VideoError(path, reason) from None

    def _read(self, chosen: NDArray[np.intp], size: tuple[int, int] | int | None) -> NDArray[np.uint8]:
        import torch
        from torchvision.transforms.v2.functional import resize

        try:
            # as a tensor, because torchcodec cannot tell the type of an empty list
            pictures = self._decoder.get_frames_at(torch.from_numpy(chosen)).data
        except (RuntimeError, IndexError) as error:
            raise VideoError(self._path, str(error).strip().splitlines()[0]) from None
        if size is not None:
            pictures = resize(pictures, list(scaled(tuple(pictures.shape[-2:]), size)), antialias=True)
        out: NDArray[np.uint8] = pictures.permute(0, 2, 3, 1).contiguous().numpy()
        return out

    def close(self) -> None:
        """Let go of the file."""
        self._decoder = None


def _scan(path: Path) -> _Index:
    """List the pictures of a file from its packets."""
    with _named(path), _opened(path) as container:
        if not container.streams.video:
            raise VideoError(path, "there is no video in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError(path, "this FFmpeg does not know its codec; convert the video")
        packets = [packet for packet in container.demux(stream) if packet.size]
        # pictures that an edit list hides are decoded, as others need them, and never shown
        shown = {packet.pts: packet.duration or 0 for packet in packets if not packet.is_discard}
        if any(packet.is_corrupt for packet in packets):
            raise VideoError(path, f"it was cut off after {len(packets) - 1} pictures")
        if None in shown:
            raise VideoError(path, "its pictures have no time stamps; remux it")
        if not shown or stream.time_base is None:
            raise VideoError(path, "there is no picture in it")
        keys = [packet.pts for packet in packets if packet.is_keyframe]
        base, declared = float(stream.time_base), stream.duration or 0
    pts = np.array(sorted(shown), dtype=np.int64)
    usual = int(np.median(np.diff(pts))) if len(pts) > 1 else 1
    last = shown[pts[-1]] or usual
    length = pts[-1] + last - pts[0]
    if length < _WHOLE * declared - usual:
        raise VideoError(path, f"it was cut off: {length * base:.1f} of {declared * base:.1f} s are there")
    return _Index(pts, np.array(sorted(keys), dtype=np.int64), base, last)


def _opened(path: Path) -> InputContainer:
    if not path.is_file():
        raise VideoError(path, "it is no regular file" if path.exists() else "there is no such file")
    if not path.stat().st_size:
        raise VideoError(path, "it is empty")
    # a title that is not UTF-8 must not keep the pictures from being read
    return av.open(str(path), metadata_errors="replace")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What FFmpeg or the file system complains of in the block is an error of this file."""
    try:
        yield
    except (FFmpegError, OSError) as error:
        raise VideoError(path, error.strerror or str(error)) from None
