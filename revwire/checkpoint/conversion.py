"""Convert a checkpoint: read it, plan its rewiring, prove it, and write the same tensors with the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from revwire import api, libraries
from revwire.checkpoint.architecture import build, check_filled, common_dtype, resolve, warn_filled
from revwire.checkpoint.folder import stem_of
from revwire.checkpoint.hub import default_out, is_hub, located
from revwire.checkpoint.metadata import is_rewired, rewiring_metadata, rewiring_of
from revwire.checkpoint.reader import read
from revwire.checkpoint.writer import check_out, write
from revwire.errors import RewireError
from revwire.libraries.inputs import call_arguments
from revwire.measure.rewired import settled
from revwire.measure.step import StepMemory, measure_step
from revwire.measure.verify import verify as run_checks
from revwire.printing import Printed
from revwire.pytree import tree_leaves
from revwire.rewrite.mark import warn_unlike

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import nn

    from revwire.checkpoint.reader import Source
    from revwire.libraries import Architecture
    from revwire.libraries.fit import Fit
    from revwire.measure.report import Report
    from revwire.planning.plan import Plan
    from revwire.run.coupling import Coupling
    from revwire.run.exact import Grid

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Savings:
    """What rewiring saves in one training step, measured.

    Attributes:
        batch: Number of inputs in the step.
        plain: Bytes held and peak of the model as it was.
        rewired: The same, rewired.
    """

    batch: int
    plain: StepMemory
    rewired: StepMemory

    @property
    def saved(self) -> int:
        """Bytes no longer held between forward and backward."""
        return self.plain.held - self.rewired.held


@dataclass(frozen=True)
class Conversion(Printed):
    """What `convert` found and did. Print it, or keep it as JSON (`to_dict`).

    Attributes:
        source: The checkpoint that was read.
        entry: Its entry that holds the weights (`state_dict_ema`); `""` is the file as a whole.
        architecture: The model the tensors belong to.
        fit: What of the tensors goes under another name, has no place in the model, or is not there.
        plan: What is rewired.
        report: The verification; None where it was not asked for.
        out: The file written; None where the verification failed, and nothing was.
        source_bytes: Size of the file that was read.
        out_bytes: Size of the file written.
        savings: What rewiring saves in training; None where nothing was written.
    """

    source: Path
    entry: str
    architecture: Architecture
    fit: Fit
    plan: Plan
    report: Report | None
    source_bytes: int
    out: Path | None = None
    out_bytes: int = 0
    savings: Savings | None = None

    @property
    def ok(self) -> bool:
        """Whether the rewired checkpoint was written."""
        return self.out is not None

    def to_dict(self) -> dict[str, Any]:
        """The conversion as JSON-ready dicts and lists."""
        return {
            "source": str(self.source),
            "entry": self.entry,
            "source_bytes": self.source_bytes,
            "architecture": self.architecture.spec,
            "model_args": dict(self.architecture.model_args),
            "fit": self.fit.to_dict(),
            "plan": self.plan.to_dict(),
            "report": self.report.to_dict() if self.report else None,
            "out": str(self.out) if self.out else None,
            "out_bytes": self.out_bytes,
            "savings": {**asdict(self.savings), "saved": self.savings.saved} if self.savings else None,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.filesize import decimal
        from rich.table import Table
        from rich.text import Text

        yield self.plan
        if self.report:
            yield self.report
        if self.savings:
            table = Table(title=f"one training step, batch {self.savings.batch}", title_justify="left")
            for heading in ("", "held for backward", "peak"):
                table.add_column(heading, justify="right" if heading else "left")
            for name, memory in (("plain", self.savings.plain), ("rewired", self.savings.rewired)):
                table.add_row(name, decimal(memory.held), decimal(memory.peak))
            yield table
            yield f"saved in every step: {decimal(self.savings.saved)}"
        part = f", {self.entry}" if self.entry else ""
        read = f"read {self.source} ({decimal(self.source_bytes)}{part}), {self.architecture}"
        wrote = (
            f"wrote {self.out} ({decimal(self.out_bytes)}), for revwire.load" if self.out else "wrote nothing"
        )
        yield Text("\n".join([read, *self.fit.in_words(self.architecture.library), wrote]), overflow="fold")


def convert(
    path: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    coupling: str | Coupling | None = None,
    exact: bool | int | Grid | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint into one of the rewired model.

    The tensors are written as they were read, byte for byte; architecture, coupling and plan go into the
    metadata. The planning, the verification and the measurement run on the CPU, in float32 at least.

    Args:
        path: A safetensors file, or a torch file of tensors only; an index of several files, or a folder with one, as
            timm and transformers save them; or `hf-hub:NAME`, which is downloaded.
        out: Where to write; by default `model.revwire.safetensors` beside `model.safetensors`, and in the current
            folder what comes from the hub.
        arch: Name of the model, `resnet50` of timm or `torchvision/resnet50`, where the file, a `config.json`
            beside it and the tensors do not tell.
        model_args: Arguments that its library builds it with; without `arch` they go over those the file names.
        coupling: The coupling the model is rewired with, by name or as an object, as for `revwire.rewire`. None: the
            one that a file which is rewired already tells of, else `"re2tal"`.
        exact: Whether its streams are in fixed point, as for `revwire.rewire`; None: as for `coupling`, else False.
        verify: Verify before writing.
        progress: Called with what is being done, in a few words.

    Returns:
        What was found and done. Where the verification failed, nothing was written: `ok` is False.

    Raises:
        CheckpointError: The file cannot be read, does not fit its architecture, or `out` cannot be written.
        RewireError: The model has nothing to rewire.
    """
    # long: the steps of a conversion in the order they happen, each said before it is done
    say = progress or (lambda _: None)
    if is_hub(path):
        say(f"fetching {path}")
        out = out or default_out(path)
    path = located(path)
    say(f"reading {path.name}")
    source = read(path)
    out = Path(out) if out else _default_out(source.path)
    for file in source.files or (source.path,):
        check_out(out, file)
    architecture = resolve(source, arch, model_args)
    say(f"building {architecture.spec}")
    model, fit = _plain(source, architecture)
    if libraries.example_inputs(model, 1) is None:
        raise RewireError(
            f"{path}: what {architecture} is called with is not known; load it with {architecture.library} and call "
            f"revwire.rewire(model, example_inputs)"
        )
    say("planning")
    own = rewiring_of(source.metadata, path) if is_rewired(source.metadata) else None
    way = settled({"coupling": coupling, "exact": exact}, own)
    plan = api.plan(model, **way)
    if own is not None:
        warn_unlike(own, plan, f"the weights of {path}", stacklevel=2)
    if not plan.chains:
        reasons = "; ".join(f"{left.module or 'the model'}: {left.reason}" for left in plan.skipped[:3])
        raise RewireError(
            f"{path}: nothing in {architecture} can be rewired ({reasons or 'no residual found'})"
        )
    check_filled(fit, plan, str(path))
    report = None
    if verify:
        report = run_checks(model, **way, progress=lambda check: say(f"verifying: {check}"))
    done = Conversion(path, source.entry, architecture, fit, plan, report, source.size)
    if report and not report.ok:
        return done
    say("measuring a training step")
    savings = _measure(model, plan)
    say(f"writing {out.name}")
    write(
        out,
        source.tensors_for(architecture.library),
        {**source.metadata, **rewiring_metadata(architecture, plan)},
    )
    return replace(done, out=out, out_bytes=out.stat().st_size, savings=savings)


def load_plain(
    path: str | Path, *, arch: str | None = None, model_args: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Plan | None]:
    """Load a checkpoint, converted or not, into its model as it is without rewiring.

    Args:
        path: As in `convert`.
        arch: As in `convert`.
        model_args: As in `convert`.

    Returns:
        The model on the CPU, in float32 at least; and the plan that a converted file carries.

    Raises:
        CheckpointError: The file cannot be read, or does not fit its architecture.
    """
    source = read(located(path))
    plan = rewiring_of(source.metadata, source.path) if is_rewired(source.metadata) else None
    model, fit = _plain(source, resolve(source, arch, model_args))
    warn_filled(fit, source.path)
    return model, plan


def _plain(source: Source, architecture: Architecture) -> tuple[nn.Module, Fit]:
    tensors = source.tensors_for(architecture.library)
    dtype = torch.promote_types(common_dtype(tensors), torch.float32)
    return build(architecture, tensors, str(source.path), dtype)


def _default_out(path: Path) -> Path:
    """`model.revwire.safetensors` beside `model.safetensors`, `model.pth` or `model.revwire.safetensors`."""
    return path.with_name(f"{stem_of(path).removesuffix('.revwire')}.revwire.safetensors")


def _measure(model: nn.Module, plan: Plan) -> Savings:
    """Measure a training step of the model before and after rewiring; the model is used up."""
    inputs = libraries.example_inputs(model)
    batch = next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    args, kwargs = call_arguments(model, inputs)
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            model(
                *args, **kwargs
            )  # fills the caches that stay, rope tables for one, which are no activations
        plain = measure_step(model, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plan says it
            api.rewire(model, inputs, coupling=plan.coupling, exact=plan.exact, plan=plan)
        rewired = measure_step(model, inputs)
    return Savings(batch, plain, rewired)
