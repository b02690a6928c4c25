"""Files on disk: only regular ones are read, and what is written is the old file or the whole new one."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from revwire.checkpoint.signals import held_signals
from revwire.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

STDIN = "-"
"""The name of standard input, where a checkpoint is read from a pipe."""

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: reading a pipe or a device may wait for ever, or never end.

    Raises:
        CheckpointError: it is something else, or not there.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot open {path}: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        hint = (
            f"; a checkpoint in a pipe is read from standard input, which is called {STDIN}"
            if stat.S_ISFIFO(mode)
            else ""
        )
        raise CheckpointError(f"cannot open {path}: it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}{hint}")


def text_of(path: Path, most: int) -> str:
    """The text of a small file.

    Args:
        path: The file, of UTF-8.
        most: Bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is larger, no text, or no regular file.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(path)
    check_regular(path)
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size} bytes; at most {most} are read")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


@contextmanager
def written_whole(out: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write: it takes the place of `out` when the block ends, in one step, and nothing of it is left if not.

    An older file's permissions are kept, and a link goes on pointing where it did.

    Args:
        out: The file.
        size: How many bytes it will have, if that is known: it is not begun where they do not fit.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    try:
        place = out.resolve()
        free = shutil.disk_usage(place.parent).free
        if size is not None and free < size:
            raise CheckpointError(_full(out, size, free))
        # a folder of its own beside it: on the same disk, so that the last move is one step
        with _own_folder(place.parent) as folder:
            part = folder / "part"
            with part.open("wb") as file:  # with the mode that files usually get
                yield file
                file.flush()
                os.fsync(file.fileno())
            if place.exists():
                part.chmod(stat.S_IMODE(place.stat().st_mode))
            part.replace(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(_full(out, size)) from error
        hint = ": name another output (-o, out=)" if error.errno in _READ_ONLY else ""
        raise CheckpointError(f"cannot write {out}: {_reason(error)}{hint}") from error


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A folder for the length of the block, which goes with all in it whatever happens, a signal at any moment."""
    with held_signals() as held:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=".revwire-"))
        try:
            try:
                held.let_through()
                yield folder
            finally:
                held.hold()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_text(out: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    data = text.encode()
    with written_whole(out, len(data)) as file:
        file.write(data)


@contextmanager
def standard_input(folder: Path) -> Iterator[Path]:
    """What comes through standard input as a file, for the length of the block: checkpoints are read in any order.

    Args:
        folder: Where there is room for it.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        with _own_folder(folder) as own:
            path = own / "stdin"
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
            yield path
    except OSError as error:
        raise CheckpointError(
            f"cannot keep what standard input brings in {folder}: {_reason(error)}"
        ) from error


def _full(out: Path, size: int | None, free: int | None = None) -> str:
    takes = "" if size is None else f", the file takes {size / 2**20:.0f} MiB"
    left = "" if free is None else f" and {free / 2**20:.0f} MiB are free"
    return f"cannot write {out}: the disk is full{takes}{left}; free some, or name an output elsewhere (-o, out=)"


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
