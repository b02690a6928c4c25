"""What revwire finds on this machine: versions, devices, optional parts, and whether a small model trains right."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from revwire.libraries import OPTIONAL, TIMM
from revwire.printing import Printed, in_words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_NEEDED = ("revwire", "torch", TIMM, "safetensors", "typer", "rich")
_OPTIONAL = {
    **OPTIONAL,
    "matplotlib": "pictures of the benchmarks: pip install 'revwire[bench]'",
    "scikit-learn": "the example on digits: pip install 'revwire[examples]'",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: What was looked for.
        found: What was found, in words; `""` if nothing.
        note: What it is for, or what to do.
        ok: Whether revwire works with that.
    """

    what: str
    found: str
    note: str = ""
    ok: bool = True


@dataclass(frozen=True)
class Diagnosis(Printed):
    """All findings; prints as a table."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether revwire works here."""
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON-ready dicts and lists."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"revwire {'works here' if self.ok else 'does NOT work here'}", title_justify="left"
        )
        for heading in ("what", "found", ""):
            table.add_column(heading, overflow="fold")
        for finding in self.findings:
            colour = "green" if finding.ok and finding.found else "yellow" if finding.ok else "red"
            found = f"[{colour}]{escape(finding.found or 'not there')}[/]"
            table.add_row(escape(finding.what), found, escape(finding.note))
        yield table


def examine() -> Diagnosis:
    """Look at everything that revwire uses; takes a few seconds."""
    findings = [Finding("python", f"{platform.python_version()} on {platform.platform()}")]
    findings += [Finding(name, found := _version(name), ok=bool(found)) for name in _NEEDED]
    findings += [Finding(name, _version(name), note) for name, note in _OPTIONAL.items()]
    findings += _devices()
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), "")
    findings.append(Finding("C++ compiler", compiler, "rewire(compile=True) on a CPU"))
    return Diagnosis((*findings, _trains()))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _devices() -> list[Finding]:
    import torch

    threads = f"{torch.get_num_threads()} threads"
    found = [Finding("CPU", f"{platform.processor() or platform.machine()}, {threads}")]
    if not torch.cuda.is_available():
        return [*found, Finding("CUDA", "", "no device that this torch can use")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16 with a GradScaler"
        size = in_words(about.total_memory)
        found.append(Finding(f"cuda:{index}", f"{about.name}, {size}, CUDA {torch.version.cuda}", bf16))
    return found


def _trains() -> Finding:
    """Whether a small network that is rewired here has the gradients it should."""
    import torch
    from torch import nn

    from revwire.measure.verify import verify

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            branch: torch.Tensor = self.outer(torch.tanh(self.inner(self.norm(x))))
            return x + branch

    try:
        report = verify(nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 8))
    except Exception as error:  # noqa: BLE001 - a broken installation breaks in any way
        return Finding("self-test", f"{type(error).__name__}: {error}", "please report this", ok=False)
    failed = ", ".join(check.name for check in report.checks if not check.ok)
    return Finding("self-test", f"failed: {failed}" if failed else "gradients are right", ok=not failed)
