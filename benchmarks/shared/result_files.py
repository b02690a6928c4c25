"""Result files: their folder, and what each says of where it comes from: command, date, machine and versions."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import revwire

RESULTS = Path(__file__).parents[1] / "results"


def origin(module: str) -> dict[str, Any]:
    """JSON-ready description of this run.

    Args:
        module: The module run with `python -m`, such as `benchmarks.memory`.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """CPU model, cores, threads torch uses, the GPU if there is one, and how busy the cores were of late."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        # of the last minute, when the run is over: well above `threads`, others used the cores; doubt the seconds
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    packages = {"torch": torch.__version__, "timm": timm.__version__, "revwire": revwire.__version__}
    return {"python": platform.python_version(), **packages}


def caption(document: dict[str, Any]) -> str:
    """Machine, versions and date of a result file, in one line."""
    host, packages = document["machine"], document["versions"]
    device = host["gpu"] or f"{host['cpu']}, {host['threads']} threads"
    return ", ".join(
        [device, *(f"{name} {version}" for name, version in packages.items()), document["date"][:10]]
    )


def write(document: dict[str, Any], path: Path) -> Path:
    """Write a result file, and make its folder; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
