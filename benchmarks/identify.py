"""Is an architecture known by its tensors alone?

    python -m benchmarks.identify --help

A state dict of each architecture is saved without metadata, opened again as `revwire convert` opens it, and identified.
The values are zeros, for only names and shapes are looked at. An answer is right if it is the architecture itself, or
another name of the same function; a tie is listed, not chosen from, and is right if the architecture is in the list.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.progress import track
from safetensors.torch import save_file

from benchmarks.shared import result_files
from revwire.checkpoint.fingerprint import index
from revwire.checkpoint.identify import identify
from revwire.checkpoint.reader import read
from revwire.libraries import Architecture, torchvision_models

NAME = "identify"


def one(name: str, up_to: float, folder: Path) -> dict[str, Any] | None:
    """Save and identify one architecture, by its short form; None where it has more parameters."""
    outline = Architecture.of(name).outline()
    if sum(p.numel() for p in outline.parameters()) > up_to:
        return None
    path = folder / "model.safetensors"
    save_file({n: torch.zeros_like(t, device="cpu") for n, t in outline.state_dict().items()}, path)
    del outline
    gc.collect()
    start = time.perf_counter()
    found = identify(read(path).tensors)
    seconds = time.perf_counter() - start
    outcome = "wrong" if found.choices else "unknown"
    if name in found.names:
        outcome = "identified" if found.only else "tie"
    return {
        "name": name,
        "outcome": outcome,
        "functions": len(found.choices),
        "names": len(found.names),
        "seconds": round(seconds, 2),
    }


def main(
    millions: Annotated[float, typer.Option(help="Parameters of the largest model.")] = 40,
    family: Annotated[int, typer.Option(help="Architectures of a family, drawn by seed; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    library: Annotated[
        str, typer.Option(help="timm, or torchvision, of which families are not told.")
    ] = "timm",
    minutes: Annotated[float, typer.Option(help="Stop after so long, in a random order.")] = 120,
    resume: Annotated[
        bool, typer.Option(help="Go on where the run in the results file was stopped.")
    ] = False,
) -> None:
    """Identify architectures and write benchmarks/results/identify.json, or identify-torchvision.json."""
    warnings.simplefilter("ignore")
    names = _drawn(library, family, seed)
    results, larger, start = [], 0, time.perf_counter()
    path = result_files.RESULTS / f"{NAME}{'' if library == 'timm' else f'-{library}'}.json"
    if resume:  # with the options of the run before, or the order is another
        before = json.loads(path.read_text())
        results, larger = before["results"], before["larger"]
    with tempfile.TemporaryDirectory() as folder:
        for name in track(names[larger + len(results) :], "identifying"):
            if time.perf_counter() - start > 60 * minutes:
                break
            result = one(name, millions * 1e6, Path(folder))
            larger += result is None
            if result:
                results.append(result)
    data = {**result_files.origin(f"benchmarks.{NAME}"), **_summary(library, results)}
    data |= {"asked": len(names), "larger": larger, "not_reached": len(names) - larger - len(results)}
    result_files.write({**data, "results": results}, path)
    print(json.dumps(data, indent=1))


def _drawn(library: str, family: int, seed: int) -> list[str]:
    families = defaultdict(list)
    if library == "torchvision":
        families[library] = [Architecture(name, {}, library).spec for name in torchvision_models.names()]
    else:
        for name in timm.list_models():
            families[timm.models._registry._model_to_module[name]].append(name)  # noqa: SLF001 - no public one
    chance = random.Random(seed)  # noqa: S311 - a sample
    drawn = [
        name
        for names in families.values()
        for name in chance.sample(names, min(family or len(names), len(names)))
    ]
    chance.shuffle(drawn)
    return drawn


def _summary(library: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [result["seconds"] for result in results]
    outcomes = [result["outcome"] for result in results]
    return {
        "index": {library: index(library).version, "architectures": len(index(library).architectures)},
        "identifications": len(results),
        **{outcome: outcomes.count(outcome) for outcome in ("identified", "tie", "unknown", "wrong")},
        "seconds": {"median": statistics.median(seconds), "largest": max(seconds)},
        "not_known": [r["name"] for r in results if r["outcome"] in ("unknown", "wrong")],
    }


if __name__ == "__main__":
    typer.run(main)
