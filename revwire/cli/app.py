"""The command `revwire`: parse, call, print.

Results go to stdout, as tables or (`--json`) as JSON and nothing else; progress and errors go to stderr.
torch and timm are imported inside the commands, so that `--help` and usage errors answer at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.markup import escape

from revwire.cli.ending import ended_in_order
from revwire.cli.options import (
    Amp,
    ArchOption,
    CouplingOption,
    ExactOption,
    InputSizeOption,
    JsonOption,
    ModelArgsOption,
    ModelArgument,
    Target,
)
from revwire.cli.terminal import Terminal, shown
from revwire.cli.values import finite, parse_arguments, parse_size
from revwire.errors import RevwireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from revwire.planning.plan import Plan

_WIDTH_OF_A_PIPE = 110  # columns of a table where no terminal says how many there are

app = typer.Typer(
    name="revwire",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Result(Protocol):
    """What a command prints: a rich renderable that has a JSON form too."""

    def to_dict(self) -> dict[str, Any]: ...


def _write_page(
    path: Path,
    name: str,
    made: Plan,
    network: nn.Module,
    size: tuple[int, ...] | None,
    batch: int,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    from revwire.checkpoint.disk import write_text
    from revwire.cli.models import batch_of
    from revwire.cli.page import page
    from revwire.measure.estimate import estimate as of_steps
    from revwire.measure.strategies import STRATEGIES

    network.train()
    found = None
    if made.chains:
        rewired = {n: {**(STRATEGIES[n] or {}), **options} for n in ("rewired", "transitions", "lean")}
        ways = {"plain": "plain", "checkpoint": "checkpoint", **rewired}
        found = of_steps(
            network,
            batch_of(network, name, size, batch),
            strategies=ways,
            progress=lambda way: say(f"estimating {name}: {way}"),
        )
    write_text(path, page(name, made, found))
    typer.echo(shown(f"written: {path}"), err=True)


def _version(asked: bool) -> None:
    if asked:
        from revwire.version import __version__

        typer.echo(f"revwire {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewire pretrained residual networks into reversible ones and train them with a memory-free backward."""


@app.command(
    epilog="Example: revwire plan vit_base_patch16_224 --exclude 'blocks.0'; "
    "revwire plan resnet50 --coupling 'dr2net(alpha=1,beta=0.125)' --exact"
)
def plan(
    model: ModelArgument,
    coupling: CouplingOption = None,
    exact: ExactOption = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Rewire only modules of this path; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave modules of this path; repeatable.")
    ] = None,
    arch: ArchOption = None,
    model_args: ModelArgsOption = None,
    input_size: InputSizeOption = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page too: the wiring drawn, and where a step's memory goes."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Inputs in the step of --html.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show what would be rewired, and why the rest would not; changes nothing."""
    arguments, size = parse_arguments(model_args), parse_size(input_size)
    with _working(f"planning {model}") as say:
        from revwire import api
        from revwire.cli.models import inputs_of, open_model

        # said before the work, not after
        if html is not None and (html.is_dir() or not html.parent.is_dir()):
            fault = "it is a folder" if html.is_dir() else "no such folder"
            raise RevwireError(f"cannot write {html}: {fault}")
        network, own, grid = open_model(model, arch, arguments)
        made = api.plan(
            network,
            inputs_of(network, size),
            coupling=coupling or own,
            exact=grid if exact is None else exact,
            include=include or None,
            exclude=exclude or None,
        )
        if html is not None:
            options = {"coupling": made.coupling, "exact": made.exact, "include": include, "exclude": exclude}
            _write_page(html, model, made, network, size, batch, options, say)
    _print(made, as_json=as_json)


@app.command(epilog="Example: revwire verify resnet50; revwire verify resnet50 --coupling bdia --exact")
def verify(
    model: ModelArgument,
    coupling: CouplingOption = None,
    exact: ExactOption = None,
    arch: ArchOption = None,
    model_args: ModelArgsOption = None,
    input_size: InputSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on a copy of the model that rewiring it keeps its promises; exit code 1 if one is broken."""
    arguments, size = parse_arguments(model_args), parse_size(input_size)
    with _working(f"verifying {model}") as say:
        from revwire.cli.models import inputs_of, open_model
        from revwire.measure.verify import verify as run_checks

        network, own, grid = open_model(model, arch, arguments)
        report = run_checks(
            network,
            inputs_of(network, size),
            coupling=coupling or own,
            exact=grid if exact is None else exact,
            progress=lambda check: say(f"verifying {model}: {check}"),
        )
    _print(report, as_json=as_json)
    if not report.ok:
        _fail("the verification failed")


@app.command(
    epilog="Example: revwire estimate vit_large_patch16_224 --batch 64 --amp bf16 --limit 24GiB; "
    "revwire estimate swin_base_patch4_window7_224 -b 32 -s checkpoint -s rewired -s lean"
)
def estimate(
    model: ModelArgument,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Inputs in the step.")] = 8,
    amp: Annotated[Amp, typer.Option(help="Autocast of the forward.")] = Amp.none,
    limit: Annotated[
        str | None,
        typer.Option("--limit", "--gpu", metavar="SIZE", help="Memory, such as 24GiB: what fits into it?"),
    ] = None,
    vary: Annotated[
        int, typer.Option(min=0, help="With --limit: which dimension of the input to vary; 0: the batch.")
    ] = 0,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, momentum, sgd or none.")] = "adamw",
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy", "-s", help="plain, checkpoint, rewired, transitions, anchored or lean; repeatable."
        ),
    ] = None,
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="Gradients are there before, as in accumulation.")
    ] = False,
    device: Annotated[str, typer.Option(help="The kind of device the step is for: cpu, cuda.")] = "cpu",
    arch: ArchOption = None,
    model_args: ModelArgsOption = None,
    input_size: InputSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what one training step needs, plain, checkpointed and rewired, without running it."""
    arguments, size = parse_arguments(model_args), parse_size(input_size)
    with _working(f"estimating {model}") as say:
        import torch

        from revwire.cli.models import batch_of, open_model
        from revwire.measure.estimate import COMMON
        from revwire.measure.estimate import estimate as of_steps

        network, _, _ = open_model(model, arch, arguments)
        network.train()
        found = of_steps(
            network,
            batch_of(network, model, size, batch),
            strategies=strategy or COMMON,
            optimizer=None if optimizer == "none" else optimizer,
            autocast=None if amp is Amp.none else torch.bfloat16 if amp is Amp.bf16 else torch.float16,
            accumulate=accumulate,
            limit=limit,
            vary=vary,
            device=device,
            progress=lambda name: say(f"estimating {model}: {name}"),
        )
    _print(found, as_json=as_json)


@app.command(
    epilog="Example: revwire convert model.safetensors; "
    "revwire convert model.pth --arch torchvision/swin_t; revwire convert hf-hub:timm/resnet50.a1_in1k; "
    "revwire convert model.safetensors --coupling 'momentum(gamma=0.5)' --exact; "
    "revwire convert trained.revwire.safetensors --to original; "
    "revwire convert - -o model.revwire.safetensors  # of standard input"
)
def convert(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The checkpoint: safetensors, .pth or .bin, a folder with one, hf-hub:NAME, or - for standard input.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write; by default FILE.revwire.safetensors.")
    ] = None,
    coupling: CouplingOption = None,
    exact: ExactOption = None,
    arch: ArchOption = None,
    model_args: ModelArgsOption = None,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify before writing.")] = True,
    to: Annotated[
        Target, typer.Option(help="original: the way back, a rewired checkpoint as its library's own.")
    ] = Target.rewired,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint of the rewired model: the same tensors, and the plan in the metadata.

    The architecture is told by the file, by a config.json beside it, or by the names and shapes of its tensors.
    """
    arguments = parse_arguments(model_args)
    with _working(f"converting {file}") as say:
        from revwire import checkpoint

        with _on_disk(file, out) as path:
            if to is Target.original:
                back = checkpoint.to_original(path, out, arch=arch, model_args=arguments, progress=say)
                _print(back, as_json=as_json)
                return
            done = checkpoint.convert(
                path,
                out,
                arch=arch,
                model_args=arguments,
                coupling=coupling,
                exact=exact,
                verify=check,
                progress=say,
            )
    _print(done, as_json=as_json)
    if not done.ok:
        _fail("the verification failed, nothing was written")


@app.command(epilog="Example: revwire doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices and optional parts, and test revwire on a small model; exit code 1 if it fails."""
    with _working("examining"):
        from revwire.cli.doctor import examine

        found = examine()
    _print(found, as_json=as_json)
    if not found.ok:
        _fail("revwire does not work here")


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    app(prog_name="revwire")


@contextmanager
def _working(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while a command works; an expected error ends it with one line and exit code 1."""
    console = Terminal(stderr=True)
    try:
        with ended_in_order(), console.status(escape(text)) as status:
            yield lambda step: status.update(escape(step))
    except RevwireError as error:
        _fail(str(error))


@contextmanager
def _on_disk(file: str, out: Path | None) -> Iterator[str | Path]:
    """The checkpoint that FILE names; what comes through standard input is kept beside the output meanwhile."""
    from revwire.checkpoint.disk import STDIN, standard_input

    if file != STDIN:
        yield file
        return
    if out is None or not out.absolute().parent.is_dir():
        raise RevwireError("of standard input there is no name to call the output after: name one (-o FILE)")
    with standard_input(out.absolute().parent) as path:
        yield path


def _fail(text: str) -> None:
    typer.echo(shown(f"revwire: {' '.join(text.split())}"), err=True)
    raise typer.Exit(1)


def _print(result: _Result, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(finite(result.to_dict()), indent=2, allow_nan=False))
    else:
        Terminal(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE).print(result)
