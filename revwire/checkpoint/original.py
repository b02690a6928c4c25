"""The way back: from a rewired checkpoint to one of the original model, in the form that its library loads."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revwire.checkpoint.architecture import check_fit, resolve
from revwire.checkpoint.disk import write_text
from revwire.checkpoint.metadata import rewiring_of, without_rewiring
from revwire.checkpoint.reader import read
from revwire.checkpoint.signals import held_signals
from revwire.checkpoint.writer import check_out, write
from revwire.errors import CheckpointError, RewireError
from revwire.printing import Printed
from revwire.run.coupling import coupling_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console, ConsoleOptions, RenderResult

    from revwire.libraries import Architecture
    from revwire.libraries.fit import Fit


@dataclass(frozen=True)
class Restored(Printed):
    """What `to_original` wrote. Print it, or keep it as JSON (`to_dict`).

    Attributes:
        source: The rewired checkpoint that was read.
        out: The file or folder written.
        architecture: The model its tensors belong to.
        fit: What of the tensors goes under another name, has no place in the model, or is not there.
        coupling: What the model was rewired with.
        warning: What to know before using it; empty where the original model computes what was trained.
        source_bytes: Size of the file that was read.
        out_bytes: Size of the file written, or of the weights in the folder.
    """

    source: Path
    out: Path
    architecture: Architecture
    fit: Fit
    coupling: str
    warning: str
    source_bytes: int
    out_bytes: int

    @property
    def ok(self) -> bool:
        """Whether it was written: always, for what cannot be is an error."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return {
            "source": str(self.source),
            "out": str(self.out),
            "architecture": self.architecture.spec,
            "model_args": dict(self.architecture.model_args),
            "coupling": self.coupling,
            "warning": self.warning,
            "source_bytes": self.source_bytes,
            "out_bytes": self.out_bytes,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.filesize import decimal
        from rich.text import Text

        yield Text(
            f"read {self.source} ({decimal(self.source_bytes)}), {self.architecture}, rewired by {self.coupling}\n"
            f"wrote {self.out} ({decimal(self.out_bytes)}), for {self.architecture.recipe(self.out, self.fit)}",
            overflow="fold",
        )
        if self.warning:
            yield Text(f"warning: {self.warning}", style="yellow", overflow="fold")


def to_original(
    path: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Restored:
    """Write a rewired checkpoint as one of the original model: the same tensors, without what revwire noted.

    No memory is taken for weights: one tensor is in memory at a time.

    Args:
        path: The file, as `convert` or `save` wrote it.
        out: Where to write; by default `model.original.safetensors` beside `model.revwire.safetensors`, and for a model
            of transformers the folder `model.original`, with its configuration, as `from_pretrained` reads it.
        arch: As in `convert`.
        model_args: As in `convert`.
        progress: Called with what is being done, in a few words.

    Returns:
        What was written, with a warning where the original model computes something else than what was trained.

    Raises:
        CheckpointError: The file cannot be read, is not rewired, does not fit its architecture, or `out` cannot be
            written.
    """
    say = progress or (lambda _: None)
    path = Path(path)
    say(f"reading {path.name}")
    source = read(path)
    plan = rewiring_of(source.metadata, path)
    architecture = resolve(source, arch, model_args)
    companions = architecture.companions()
    stem = path.stem.removesuffix(".revwire")
    out = Path(out) if out else path.with_name(f"{stem}.original{'' if companions else '.safetensors'}")
    folder = out if companions and out.suffix != ".safetensors" else None
    weights = folder / "model.safetensors" if folder else out
    tensors = source.tensors_for(architecture.library)
    fit = check_fit(architecture, tensors, str(path))
    warning = _warning(plan.coupling, path)
    # whatever refuses has refused by now: a folder is made for what will be in it
    with _folder_for(folder, {weights.name, *companions}):
        check_out(weights, path)
        say(f"writing {out.name}")
        write(weights, tensors, without_rewiring(source.metadata))
        for name, text in companions.items() if folder else ():
            write_text(weights.with_name(name), text)
    return Restored(path, out, architecture, fit, plan.coupling, warning, source.size, weights.stat().st_size)


@contextmanager
def _folder_for(folder: Path | None, names: set[str]) -> Iterator[None]:
    """A folder for files of these names, new or with what an earlier call wrote; a new one goes again on an error."""
    if folder is None:
        yield
        return
    with held_signals() as held:
        there = folder.exists()
        try:
            folder.mkdir(exist_ok=True)
            others = {path.name for path in folder.iterdir()} - names
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        if others:
            raise CheckpointError(
                f"cannot write {folder}: there is more in it ({min(others)}); name a new folder (-o, out=)"
            )
        try:
            try:
                held.let_through()
                yield
            finally:
                held.hold()
        except BaseException:
            if not there:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _warning(spec: str, path: Path) -> str:
    try:
        coupling = coupling_of(spec)
    except RewireError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not coupling.in_mode(training=False).a:  # evaluates as the network it came from: bdia
        return ""
    return (
        f"weights that were trained rewired by {spec} belong to another function than the original model's: expect "
        f"worse results until it is fine-tuned; revwire.load keeps what was trained, and bdia would be the same"
    )
