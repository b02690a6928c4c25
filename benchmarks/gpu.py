"""All that a GPU has to show, in one command of under ten minutes: `python -m benchmarks.gpu --help`.

Each part runs in a process of its own and writes its own result file. What is done stands in `gpu.json`; a run that was
stopped goes on with the parts that are not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.shared import result_files, terminal

_ON_GPU = ["benchmarks.memory", "--device", "cuda", "--amp", "bf16"]
_PYRAMIDS = ["-m", "swin_tiny_patch4_window7_224@64", "-m", "convnext_tiny@64", "-m", "resnet50@64"]


def _ways(*names: str) -> list[str]:
    return [word for name in names for word in ("-s", name)]


PARTS: dict[str, list[str]] = {
    "graphs": [
        *_ON_GPU, "--name", "graphs-cuda-bf16", "--rounds", "15", "-m", "vit_small_patch16_224@16",
        "-m", "vit_small_patch16_224@64", "-m", "vit_large_patch16_224@16",
        *_ways("plain", "plain, graph", "checkpoint", "rewired", "rewired, graph", "checkpoint, graph"),
    ],
    "memory": [
        *_ON_GPU, "--estimate", "-m", "vit_small_patch16_224@64", "-m", "vit_large_patch16_224@32", *_PYRAMIDS,
        *_ways("plain", "checkpoint", "rewired", "transitions", "anchored", "lean"),
    ],
    "dials": [
        *_ON_GPU, "--name", "dials-cuda-bf16", "--rounds", "15", "-m", "vit_small_patch16_224@64",
        *_ways("plain", "rewired", "unchecked", "overlap", "offload", "compiled", "compiled, overlap"),
    ],
    "largest batch": ["benchmarks.largest_batch"],
    "depth": ["benchmarks.depth", "--device", "cuda", "--amp", "bf16", "-m", "vit_small_patch16_224@64"],
    "tests": ["pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/whole", "tests/measure"],
}  # fmt: skip
"""By name: what `python -m` runs."""


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Run one part.

    Returns:
        Its exit code (None: stopped at the limit), its seconds and the end of what it printed.
    """
    start = time.monotonic()
    code: int | None
    try:
        done = subprocess.run(  # noqa: S603 - the commands above
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
            cwd=result_files.RESULTS.parents[1],
        )
        code, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code, printed = None, (stopped.stdout or b"").decode(errors="replace")
    lines = re.sub(r"/\S*/(revwire|benchmarks|tests|site-packages)/", r"\1/", printed).splitlines()
    seconds = round(time.monotonic() - start, 1)
    return {"command": ["python", "-m", *command], "exit": code, "seconds": seconds, "printed": lines[-60:]}


def table(done: dict[str, Any]) -> Table:
    """What is done, to print."""
    shown = Table(title="on the GPU", title_justify="left")
    for heading in ("part", "how it ended", "seconds"):
        shown.add_column(heading)
    for name in PARTS:
        part = done.get(name)
        how = (
            "to come"
            if part is None
            else {0: "done", None: "stopped"}.get(part["exit"], f"exit {part['exit']}")
        )
        shown.add_row(name, how, "" if part is None else f"{part['seconds']:g}")
    return shown


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; repeat; all if not given.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="No part runs longer than is left of this.")] = 9.5,
    again: Annotated[bool, typer.Option("--again", help="Also the parts that are done.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of gpu.json.", show_default="benchmarks/results")
    ] = result_files.RESULTS,
) -> None:
    """Run tests and benchmarks on the GPU, each part once, and write down how each ended.

    One part: python -m benchmarks.gpu --part memory --again
    """
    if unknown := [name for name in part or () if name not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--part")
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU here")
    console, path, end = terminal.console(), out / "gpu.json", time.monotonic() + 60 * minutes
    done: dict[str, Any] = json.loads(path.read_text("utf-8"))["parts"] if path.exists() else {}
    for name in part or PARTS:
        if not again and done.get(name, {}).get("exit") == 0:
            continue
        if (left := end - time.monotonic()) < 10:
            break
        console.print(f"{name}: python -m {' '.join(PARTS[name])}")
        done[name] = run(PARTS[name], left)
        console.print(*done[name]["printed"], sep="\n", markup=False, highlight=False)
        result_files.write({**result_files.origin("benchmarks.gpu"), "parts": done}, path)
    console.print(table(done), f"written: {path}", sep="\n")


if __name__ == "__main__":
    typer.run(main)
