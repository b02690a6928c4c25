"""Spoilt checkpoints through load, plan, convert and the way back: `python -m tests.fuzz --help`.

Anything but a model or an error of revwire's is a finding: another error, a crash, a hang of more than `HANG_S`
seconds of work, a peak of more than `MEMORY_MIB` of memory, and what is left beside the file. A finding's file is kept,
and its seed makes it again.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from revwire import checkpoint
from revwire.errors import RevwireError
from tests.fuzz.mutate import corpus, spoilt
from tests.helpers.checkpoints import ARGS, convert
from tests.helpers.memory import field_mib, forget_peak, peak_mib
from tests.helpers.vits import NAME

HANG_S = 10
WAITS_S = 60
MEMORY_MIB = 1500
BATCH = 50
_TIMERS = {signal.ITIMER_PROF: HANG_S, signal.ITIMER_REAL: WAITS_S}  # a busy machine is no hang


def tried(path):
    """What a file comes to."""
    told = set()
    out = path.with_name("out.safetensors")
    known = {"arch": NAME, "model_args": ARGS} if path.suffix == ".pth" else {}
    calls = (
        lambda: checkpoint.load(path),
        lambda: checkpoint.load_plain(path, **known),
        lambda: convert(path, out, **known),
        lambda: checkpoint.to_original(path, path.with_name("back.safetensors")),
    )
    for call in calls:
        try:
            call()
        except RevwireError:
            told.add("refused")
        else:
            told.add("taken")
    for name in ("out.safetensors", "back.safetensors"):
        path.with_name(name).unlink(missing_ok=True)
    if left := [each.name for each in path.parent.iterdir() if each != path]:
        raise AssertionError(f"left behind: {left}")
    return " and ".join(sorted(told))


def _hung(*_):
    raise TimeoutError(f"more than {HANG_S} s, or {WAITS_S} s of waiting")


def bounded():
    """This process never takes the machine's last memory."""
    resource.setrlimit(resource.RLIMIT_AS, (2**20 * (field_mib("VmSize") + 4 * MEMORY_MIB),) * 2)


def batch(folder, kept, seeds):
    """Outcomes by seed; what a process does not live through is not among them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _hung)
    files = sorted(Path(folder).iterdir())
    outcomes = {}
    for seed in seeds:
        own = random.Random(seed)
        with tempfile.TemporaryDirectory() as own_folder:
            source = own.choice(files)
            path = Path(own_folder, f"file{source.suffix}")
            way = spoilt(source, path, own)
            forget_peak()
            before = peak_mib()
            for timer, seconds in _TIMERS.items():
                signal.setitimer(timer, seconds, 1)  # again where a finalizer swallowed it
            try:
                outcome = tried(path)
            except BaseException as error:  # noqa: BLE001 - findings of any kind
                at = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(at.filename).name}:{at.lineno}"
                outcome = f"FOUND {type(error).__name__}: {str(error)[:150]} ({place})"
            finally:
                for timer in _TIMERS:
                    signal.setitimer(timer, 0)
            if (taken := peak_mib() - before) > MEMORY_MIB:
                outcome = f"FOUND {taken} MiB of memory: {outcome}"
            if outcome.startswith("FOUND"):
                shutil.copy(path, Path(kept, f"{seed}{path.suffix}"))
            outcomes[seed] = way, outcome
    return outcomes


def in_processes(jobs, folder, kept, group):
    """What the files of some batches came to, each batch in a new process: one that dies takes no other with it."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), bounded) as pool:
        for seeds, future in [(s, pool.submit(batch, folder, kept, s)) for s in group]:
            try:
                yield from future.result().items()
            except Exception as error:  # noqa: BLE001 - the process died
                yield seeds[0], ("a batch", f"FOUND a crash in {seeds}: {error}")


def main(
    files: Annotated[int, typer.Option(help="How many are tried.")] = 20_000,
    seconds: Annotated[float, typer.Option(help="Stop after so many; 0: not before all are tried.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the first file.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    kept: Annotated[Path, typer.Option(help="Where files that found something are kept.")] = Path(
        "fuzz-findings"
    ),
) -> None:
    """Try spoilt checkpoints, and tell what they came to; exit code 1 where one was more than refused.

    A finding again: python -m tests.fuzz --seed 1234 --files 1
    """
    console, start = Console(), time.monotonic()
    kept.mkdir(exist_ok=True)
    counts, found, done = Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        corpus(Path(folder))
        batches = [range(at, min(at + BATCH, seed + files)) for at in range(seed, seed + files, BATCH)]
        groups = [batches[i : i + jobs] for i in range(0, len(batches), jobs)]
        for group in track(groups, "trying", console=console):
            if done and done % 1000 < jobs * BATCH and not console.is_terminal:
                console.print(f"{done} files, {len(found)} findings, {time.monotonic() - start:.0f} s")
            if seconds and time.monotonic() - start > seconds:
                break
            for number, (way, outcome) in in_processes(jobs, folder, kept, group):
                done += 1
                counts["FOUND" if outcome.startswith("FOUND") else outcome] += 1
                if outcome.startswith("FOUND"):
                    found.append(f"{number} {way}: {outcome}")
    for line in found[:50]:
        console.print(line, markup=False, highlight=False)
    console.print(f"{done} files in {time.monotonic() - start:.0f} s: {dict(counts)}", markup=False)
    if not any(kept.iterdir()):
        kept.rmdir()
    if found:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
