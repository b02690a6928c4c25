"""Signals at random moments of conversions and of training runs: `python -m tests.fuzz.signals --help`.

Each is sent to a process of its own, forked from one that has imported what commands import, at a moment of the time
that the command takes by itself. What must hold: the process ends within `LIMIT_S`; files are those from before or
those from after, never a part of one; nothing lies beside them that a whole run does not leave; and a training run goes
on, to the same figures.
"""

import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
import yaml
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file

from examples.re2tal import train
from revwire.cli.app import main as revwire_command
from tests.re2tal import tiny

LIMIT_S = 5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MODEL = "vit_tiny_patch16_224"  # large enough that writing it takes a while
RESUMED_OF = 5
"""Of so many runs that were stopped one is given the same command again and taken to its end."""


def run_of(told, command, *arguments):
    """A process that runs a command, ends as the command ends, and tells a file what it would tell the terminal."""

    def within():
        sys.argv[1:] = [str(each) for each in arguments]
        os.setsid()
        torch.set_num_threads(1)
        for number in SIGNALS:  # a background job of a shell ignores some
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with told.open("w") as file, Path(os.devnull).open() as nothing:
            for number, to in enumerate((nothing, file, file)):
                os.dup2(to.fileno(), number)
        faulthandler.register(signal.SIGUSR1)
        command()

    process = multiprocessing.get_context("fork").Process(target=within)
    process.start()
    return process


class Conversion:
    """`revwire convert`, to a place where an older file lies or not."""

    def __init__(self, folder):
        self.source = folder / "model.safetensors"
        save_file(timm.create_model(MODEL, num_classes=10).state_dict(), self.source)
        architecture = ("--arch", MODEL, "--model-args", '{"num_classes": 10}')
        self.arguments = ["convert", self.source, *architecture, "--no-verify"]

    def prepare(self, place, own):
        out = place / "out.safetensors"
        if own.random() < 0.5:
            save_file({"older": torch.ones(3)}, out)
        return (revwire_command, *self.arguments, "-o", out)

    def complaint(self, place, _):
        left = sorted(path.name for path in place.iterdir())
        if left not in ([], ["out.safetensors"]):
            return f"left {left}"
        if left:
            found, wanted = load_file(place / left[0]), load_file(self.source)
            older = found.keys() == {"older"}
            if not older and not (
                found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
            ):
                return "a torn file"
        return None


class WayBack(Conversion):
    """`revwire convert --to original`."""

    def __init__(self, folder):
        super().__init__(folder)
        rewired = folder / "rewired.safetensors"
        ended(run_of(folder / "told", revwire_command, *self.arguments, "-o", rewired), 600)
        self.arguments = ["convert", rewired, "--to", "original"]


class Training:
    """A run of the flagship that takes seconds, with a checkpoint every epoch."""

    def __init__(self, folder):
        self.data = tiny.data(folder / "data")
        whole = folder / "run"
        ended(run_of(folder / "told", *self._command(whole)), 600)
        self.left = set(self._files(whole))
        self.figures = json.loads((whole / "results.json").read_text())

    def _files(self, output):
        """Each by a name without the numbers of steps and times."""
        for path in output.rglob("*"):
            kind = "events" if path.name.startswith("events.out.tfevents.") else path.name
            yield str(path.relative_to(output).with_name(re.sub(r"\d{8}", "N", kind)))

    def _command(self, output):
        output.parent.mkdir(exist_ok=True)
        settings = tiny.settings(self.data, output, optim={"epochs": 4})
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(settings))
        return lambda: typer.run(train.main), file

    def prepare(self, place, _):
        return self._command(place / "run")

    def complaint(self, place, own):
        output = place / "run"
        if more := sorted(set(self._files(output)) - self.left):
            return f"left {more}"
        for checkpoint in output.rglob("*.pt"):
            torch.load(checkpoint, weights_only=True)
        for report in output.glob("report.html"):
            if not report.read_text().rstrip().endswith("</html>"):
                return "a torn report"
        if own.randrange(RESUMED_OF) == 0:
            process = run_of(place.with_name("told"), *self._command(output))
            if ended(process, 600) is None or process.exitcode:
                return f"cannot go on: {process.exitcode}"
            if json.loads((output / "results.json").read_text()) != self.figures:
                return "went on to other figures"
        return None


def ended(process, limit_s):
    """Seconds until a process ended, which is killed if they are too many."""
    start = time.monotonic()
    process.join(limit_s)
    if process.exitcode is not None:
        return time.monotonic() - start
    os.kill(process.pid, signal.SIGUSR1)  # tells where it is
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return None


def tried(job, place, own, usual_s):
    """What one signal comes to, and seconds until the end."""
    number = own.choice(SIGNALS)
    process = run_of(place.with_name("told"), *job.prepare(place, own))
    time.sleep(own.uniform(0, usual_s))
    if process.is_alive():
        os.kill(process.pid, number)
    took = ended(process, LIMIT_S)
    words = place.with_name("told").read_text()[-3000:]
    if took is None:
        return f"FOUND {number.name}: not ended within {LIMIT_S} s\n{words}", LIMIT_S
    told = {0, -number, 128 + number} | ({1} if number is signal.SIGINT else set())
    if process.exitcode not in told:
        return f"FOUND {number.name}: exit code {process.exitcode}\n{words}", took
    if complaint := job.complaint(place, own):
        return f"FOUND {number.name}: {complaint}", took
    return ("done before" if process.exitcode == 0 else f"ended by {number.name}"), took


class Job(str, Enum):
    """What is sent signals."""

    conversion = "conversion"
    back = "back"
    training = "training"


JOBS = {Job.conversion: Conversion, Job.back: WayBack, Job.training: Training}


def main(
    count: Annotated[int, typer.Option(help="How many signals are sent.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Annotated[list[Job] | None, typer.Option(help="Repeatable.")] = None,
) -> None:
    """Send signals, and tell what they came to; exit code 1 where a file was torn or left, or a process went on."""
    console, own = Console(), random.Random(seed)
    outcomes, found, slowest = Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for kind in [JOBS[each] for each in only or Job]:
            (home := Path(folder, kind.__name__)).mkdir()
            job, place = kind(home), home / "place"
            place.mkdir()
            process = run_of(place.with_name("told"), *job.prepare(place, own))
            if (usual := ended(process, 600)) is None or process.exitcode:
                raise SystemExit(f"{kind.__name__} does not work by itself: {process.exitcode}")
            shutil.rmtree(place)
            jobs.append((job, place, usual))
        for number, (job, place, usual) in zip(
            track(range(count), "sending", console=console), itertools.cycle(jobs), strict=False
        ):
            place.mkdir()
            outcome, took = tried(job, place, own, usual)
            shutil.rmtree(place)
            slowest = max(slowest, took)
            name = type(job).__name__
            outcomes[name, "FOUND" if outcome.startswith("FOUND") else outcome] += 1
            if outcome.startswith("FOUND"):
                found.append(f"{number} {name}: {outcome}")
    for line in found[:50]:
        console.print(line, markup=False, highlight=False)
    for (name, outcome), times in sorted(outcomes.items()):
        console.print(f"{name}: {outcome} {times}", markup=False, highlight=False)
    console.print(f"{count} signals; the slowest end took {slowest:.2f} s")
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
