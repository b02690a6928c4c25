"""Which lines that keep gradients right could be removed without a test failing: `python -m tests.survivors --help`.

Taken out, one at a time, in a copy of the checkout: the condition of every `if` that raises (it never holds), and every
call that is a statement of its own (what checks, notes, puts back). A line that nothing misses is a survivor. Each
removal is tried on the tests that ran that line alone, the quickest first, in a process forked from one that has torch
imported already.
"""

import ast
import compileall
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from typing import Annotated

import coverage
import pytest
import typer
from hypothesis import Phase, settings
from rich.console import Console
from rich.markup import escape
from rich.progress import track

ROOT = Path(__file__).parents[1]
COPIED = (
    "revwire",
    "tests",
    "pyproject.toml",
    "examples",
    "benchmarks",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
)
LIMIT_S = 900
"""After which a run of tests has hung, which is noticed too."""
UNSHRUNK = "no shrinking"
EXCUSED = {
    (
        "revwire/run/attention.py",
        "super().__init__()",
    ): "torch's own does nothing, but may in another release",
}
"""What is told and not counted: removals that no test can miss, by file and text, each with why."""
AT_IMPORT = ""
"""What coverage calls what no test runs."""
COMMON = (
    *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--hypothesis-profile={UNSHRUNK}"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of what was imported before the fork
)


@dataclass(frozen=True)
class Removal:
    """A part of a source file, and what stands in its place."""

    file: str
    first: int
    last: int
    start: int
    end: int
    instead: str
    text: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.instead.encode() + source[self.end :]


def removals(tree: Path, file: Path) -> list[Removal]:
    """What is taken out of a file, in order."""
    source = (tree / file).read_bytes()
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
        found.append(Removal(str(file), part.lineno, part.end_lineno, start, end, instead, text))
    return sorted(found, key=lambda removal: removal.start)


class Contexts:
    """A plugin that tells coverage which test runs, and keeps how long those that pass take."""

    def __init__(self, measured: coverage.Coverage) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self._measured.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self._measured.switch_context(AT_IMPORT)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration


def in_fork(run, limit_s: float) -> int | None:
    """The status a function ends with in a process of its own; None if it hung."""
    if not (child := os.fork()):
        status = 70
        try:
            os.setsid()  # what the tests start goes with it
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            status = int(run())
        finally:
            os._exit(status)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def copied(source: Path, folder: str) -> Path:
    """A checkout to spoil, with the bytecode of its files, so that no removal has all of them compiled again."""
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, Path(folder, name))
            compileall.compile_dir(Path(folder, name), quiet=1)
        else:
            shutil.copy(source / name, Path(folder, name))
    return Path(folder)


def pytest_in(tree: Path, arguments: list[str], plugins: tuple = ()) -> int:
    """Runs tests of a copy, whose own packages nothing has imported yet."""
    sys.dont_write_bytecode = True  # a spoilt file may have the time and size of the right one
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
    for name in [
        n for n in sys.modules if n.partition(".")[0] in {"revwire", "tests", "benchmarks", "examples"}
    ]:
        del sys.modules[name]
    settings.register_profile(UNSHRUNK, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    return pytest.main([*COMMON, *arguments], [*plugins])


def lines_of_tests(tree: Path, files: list[Path], tests: list[str], out: Path) -> int:
    """Writes which passing test ran which lines of the files, and for how long it ran."""
    watched = [str(tree / file) for file in files]
    measured = coverage.Coverage(data_file=None, include=watched, messages=False)
    contexts = Contexts(measured)
    measured.start()
    status = pytest_in(tree, tests, (contexts,))
    measured.stop()
    data = measured.get_data()
    ran = {
        str(Path(file).relative_to(tree)): {
            line: sorted(set(names) & {AT_IMPORT, *contexts.seconds})
            for line, names in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    out.write_text(json.dumps({"ran": ran, "seconds": contexts.seconds}))
    return status


def survives(source: Path, removal: Removal, tests: list[str]) -> bool:
    """Whether all these tests pass without it."""
    if not tests:
        return True
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(source, folder)
        spoilt = tree / removal.file
        spoilt.write_bytes(removal.applied(spoilt.read_bytes()))
        # of the right file, whose time and size it may have
        Path(cache_from_source(spoilt)).unlink(missing_ok=True)
        return in_fork(lambda: pytest_in(tree, ["-x", *tests]), LIMIT_S) == 0


def tests_by_line(
    source: Path, files: list[Path], tests: list[str]
) -> tuple[dict[str, dict[str, list[str]]], dict[str, float]]:
    """Of every file the lines that tests ran, each with those tests; and how long each test takes."""
    with tempfile.TemporaryDirectory() as folder:
        tree, out = copied(source, folder), Path(folder, "lines.json")
        status = in_fork(lambda: lines_of_tests(tree, files, tests, out), 20 * LIMIT_S)
        if status not in (0, 1) or not out.exists():
            raise SystemExit(f"the tests {', '.join(tests)} could not be run at all: {status}")
        found = json.loads(out.read_text())
    return found["ran"], found["seconds"]


def running_tests(
    every: list[Removal], ran: dict[str, dict[str, list[str]]], seconds: dict[str, float]
) -> list[list[str]]:
    """Of each removal the tests that run what it removes, the quickest first; all, where it runs at import."""
    running = []
    for r in every:
        lines = ran.get(r.file, {})
        names = {test for line in range(r.first, r.last + 1) for test in lines.get(str(line), ())}
        told = seconds if names == {AT_IMPORT} else names - {AT_IMPORT}
        running.append(sorted(told, key=seconds.__getitem__))
    return running


def main(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders, such as revwire/run.")],
    test: Annotated[
        list[str] | None, typer.Option(help="Tests to choose from; those of the same room if left out.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="How many at a time.")] = os.cpu_count() or 1,
) -> None:
    """Take safety lines out one by one and tell which of them no test misses.

    The room that runs: python -m tests.survivors revwire/run --test tests/run --test tests/whole --test
    tests/experimental
    """
    with contextlib.redirect_stderr(io.StringIO()):
        import timm  # noqa: F401 - what every forked process would import
        import torch  # noqa: F401
    files = [
        file.resolve().relative_to(ROOT)
        for path in paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    tests = test or sorted({f"tests/{file.parts[1]}" for file in files})
    console, survivors, excused = Console(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        source = copied(ROOT, folder)  # work in the checkout may go on
        every = [removal for file in files for removal in removals(source, file)]
        console.print(f"which of {', '.join(tests)} runs what …")
        running = running_tests(every, *tests_by_line(source, files, tests))
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            alive = pool.map(partial(survives, source), every, running)
            counted = track(alive, "removing", len(every), console=console)
            for removal, names, lives in zip(every, running, counted, strict=True):
                if lives:
                    why = f"{len(names)} tests run it" if names else "no test runs it"
                    if excuse := EXCUSED.get((removal.file, removal.text)):
                        excused += 1
                        what = f"[yellow]excused[/yellow]: {escape(excuse)};"
                    else:
                        survivors += 1
                        what = "[red]survives[/red]"
                    line = f"{what} {removal.file}:{removal.first} {escape(removal.text)} ({why})"
                    console.print(line, highlight=False)
    console.print(f"{len(every)} removed, {survivors} survive {', '.join(tests)}, {excused} excused")
    raise typer.Exit(1 if survivors else 0)


if __name__ == "__main__":
    typer.run(main)
