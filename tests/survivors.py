"""Which lines that keep gradients right could be removed without a test failing: `python -m tests.survivors --help`.

Taken out, one at a time, in a copy of the checkout: the condition of every `if` that raises (it never holds), and every
call that is a statement of its own (what checks, notes, puts back). A line that nothing misses is a survivor.
"""

import ast
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
COPIED = ("revwire", "tests", "pyproject.toml", "examples", "benchmarks", "docs", "README.md")
LIMIT = 900
"""Seconds after which a test run has hung, which is noticed too."""


@dataclass(frozen=True)
class Removal:
    """A part of a source file, and what stands in its place."""

    file: Path
    line: int
    start: int
    end: int
    instead: str
    text: str


def removals(file: Path) -> list[Removal]:
    """What is taken out of a file, in order."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in node.body):
            part, instead = node.test, "False"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            part, instead = node, "pass"
        else:
            continue
        start, end = (
            starts[line - 1] + column
            for line, column in ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))
        )
        text = " ".join(source[start:end].decode().split())
        found.append(Removal(file, part.lineno, start, end, instead, text))
    return sorted(found, key=lambda removal: removal.start)


def survives(removal: Removal, tests: list[str]) -> bool:
    """Whether all tests pass without it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(folder, name))
        source = (ROOT / removal.file).read_bytes()
        # a condition may span lines
        changed = source[: removal.start] + removal.instead.encode() + source[removal.end :]
        Path(folder, removal.file).write_bytes(changed)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *tests,
        ]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders, such as revwire/run.")],
    test: Annotated[
        list[str] | None, typer.Option(help="What to run for each; tests of the same room if left out.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many at a time.")] = 2,
) -> None:
    """Take safety lines out one by one and tell which of them no test misses."""
    files = [
        file.resolve().relative_to(ROOT)
        for path in paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    every = [removal for file in files for removal in removals(file)]
    tests = test or sorted({f"tests/{file.parts[1]}" for file in files})
    console = Console()
    survivors = 0
    with ThreadPoolExecutor(jobs) as pool:
        for removal, alive in zip(
            every,
            track(pool.map(lambda r: survives(r, tests), every), "removing", len(every), console=console),
            strict=True,
        ):
            if alive:
                survivors += 1
                console.print(
                    f"[red]survives[/red] {removal.file}:{removal.line} {removal.text}", highlight=False
                )
    console.print(f"{len(every)} removed, {survivors} survive {', '.join(tests)}")
    raise typer.Exit(1 if survivors else 0)


if __name__ == "__main__":
    typer.run(main)
