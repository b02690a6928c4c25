"""Check an annotation file, and print what is in it.

python -m examples.re2tal.annotations activity_net.v1-3.min.json
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from examples.re2tal.console import ended_by_errors, terminal
from examples.re2tal.data.annotations import Annotations, read_annotations

if TYPE_CHECKING:
    from collections.abc import Iterator


def _rows(annotations: Annotations) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys(video.subset for video in annotations.videos.values()):
        videos = annotations.subset(name)
        seconds = [action.end - action.start for video in videos for action in video.actions]
        mean = f"{sum(seconds) / len(seconds):.1f} s" if seconds else "-"
        yield (
            name,
            str(len(videos)),
            f"{sum(v.duration for v in videos) / 3600:.2f} h",
            str(len(seconds)),
            mean,
        )


def main(
    file: Annotated[Path, typer.Argument(help="The annotation file.")],
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line.")] = None,
    blocked: Annotated[Path | None, typer.Option(help="JSON list of ids to leave out.")] = None,
) -> None:
    """Check an annotation file and print what is in it.

    Example: python -m examples.re2tal.annotations thumos_14_anno.json --classes category_idx.txt
    """
    with ended_by_errors():
        annotations = read_annotations(file, classes=classes, blocked=blocked)
    table = Table(title=f"{file.name}: {len(annotations.classes)} classes", title_justify="left")
    table.add_column("subset")
    for heading in ("videos", "length", "actions", "mean length"):
        table.add_column(heading, justify="right")
    for row in _rows(annotations):
        table.add_row(*row)
    console = terminal()
    console.print(table)
    for reason, count in annotations.dropped.items():
        console.print(f"left out: {count} {reason}")
    for reason, count in annotations.faulty.items():
        console.print(f"not trained on, yet counted by evaluation: {count} {reason}")


if __name__ == "__main__":
    typer.run(main)
