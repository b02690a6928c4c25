"""Say what a file of weights holds, and write it as safetensors with the names that this example has.

python -m examples.re2tal.convert swin_tiny_patch244_window877_kinetics400.pth
python -m examples.re2tal.convert thumos_re2tal_swin_tiny.pth --out detector.safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from examples.re2tal.backbones.build import build_backbone, named
from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.errors import Re2TALError
from examples.re2tal.heads.build import build_head
from examples.re2tal.weights import actionformer
from examples.re2tal.weights.families import GUESSED, SIZES, found_in, head_in, note
from examples.re2tal.weights.layouts import fitted, listed, tensors_of
from revwire.checkpoint.writer import write as write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from examples.re2tal.weights.layouts import Found


@dataclass(frozen=True)
class Converted:
    """What a file holds.

    Attributes:
        layouts: Its backbone's layout, its head's, or both.
        name: The backbone's name, if it has one.
        options: What neither its name nor the converted file implies.
        guessed: Those of the options that no tensor tells.
        tensors: By the names of a backbone, or a head, of ours; of a whole detector's, where there are both.
    """

    layouts: tuple[Found, ...]
    name: str | None
    options: dict[str, Any]
    guessed: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def dropped(self) -> dict[str, Tensor]:
        """What of the file is not converted: heads of other tasks."""
        taken = {found.prefix + name for found in self.layouts for name in found.tensors}
        everything = self.layouts[0].stored.tensors
        return {name: tensor for name, tensor in everything.items() if name not in taken}


def converted(path: Path) -> Converted:
    """Read a file of weights, and see that it fits the backbone, and the head, that it is of.

    Raises:
        Re2TALError: it is of no layout that is known here, or does not fit.
    """
    head = head_in(path)
    try:
        family, found = found_in(path)
    except Re2TALError:
        if head is None:
            raise
        return Converted((head,), None, {}, (), _head(head))
    name, left = named(family, SIZES[family](found.get))
    decided = found.options
    with torch.device("meta"):
        backbone = build_backbone(name, **{**left, **decided})
    tensors = _saved(backbone, found, f"the backbone {name}")
    if head is not None:
        parts = {"backbone": tensors, "head": _head(head)}
        tensors = {f"{part}.{key}": tensor for part, own in parts.items() for key, tensor in own.items()}
    left = {option: value for option, value in left.items() if option not in decided}
    guessed = tuple(option for option in GUESSED.get(family, ()) if option in left)
    return Converted((found,) if head is None else (found, head), name, left, guessed, tensors)


def write(made: Converted, target: Path) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        Re2TALError: it is the file that is converted.
        CheckpointError: it cannot be written.
    """
    found = made.layouts[0]
    if target.exists() and target.samefile(found.stored.path):
        raise Re2TALError(f"{target} would be written over; give another file with --out")
    write_tensors(target, made.tensors, note(found.options, rewired=found.layout.rewired))


def _head(found: Found) -> dict[str, Tensor]:
    with torch.device("meta"):
        head = build_head("actionformer", **actionformer.sizes(found.get))
    return _saved(head, found, "the head")


def _saved(module: torch.nn.Module, found: Found, what: str) -> dict[str, Tensor]:
    names = module.state_dict().keys()
    return {
        name: t.contiguous() for name, t in fitted(found, tensors_of(module), what).items() if name in names
    }


def main(
    file: Annotated[
        Path, typer.Argument(help="Weights of mmaction2, Re2TAL, OpenTAD, pytorchvideo, torchvision...")
    ],
    out: Annotated[Path | None, typer.Option(help="Where to write; beside the file if not given.")] = None,
) -> None:
    """Say what a file of weights holds, and write it as safetensors with the names that this example has.

    Example: python -m examples.re2tal.convert thumos_re2tal_swin_tiny.pth --out detector.safetensors
    """
    with ended_by_errors():
        made = converted(file)
        target = out or file.with_name(f"{file.name.partition('.')[0]}.re2tal.safetensors")
        write(made, target)
    for line in _told(made, file, target):
        terminal().print(line, soft_wrap=True)


def _told(made: Converted, file: Path, target: Path) -> list[str]:
    found = made.layouts[0]
    entry = f" (entry {found.stored.entry})" if found.stored.entry else ""
    lines = [f"{file}{entry}: {' and '.join(one.layout.name for one in made.layouts)}"]
    if made.dropped:
        lines.append(f"left out: {listed(made.dropped)}")
    lines.append(f"wrote {len(made.tensors)} tensors to {target}")
    if made.name is None:
        return [*lines, "a head alone: examples.re2tal.weights.families.load_head takes it"]
    part = "backbone" if len(made.layouts) == 1 else "detector"
    settings = [f"backbone.name={made.name}", f"{part}.weights={target}"]
    if made.options:
        settings.append(f"'backbone.options={json.dumps(made.options)}'")
    if found.layout.rewired:
        settings.append("memory.strategy=rewired")
    lines.append(f"train with {' '.join(settings)}")
    return lines + [f"{name} is a guess, no tensor tells" for name in made.guessed]


if __name__ == "__main__":
    typer.run(main)
