"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Name of a timm or torchvision/ model (random weights); a checkpoint, or its folder; hf-hub:NAME.",
    ),
]


_COUPLINGS = "re2tal, dr2net, momentum or bdia, with or without coefficients: 'dr2net(alpha=1,beta=0.125)'"


CouplingOption = Annotated[
    str | None,
    typer.Option(
        help=f"How the two streams are coupled: {_COUPLINGS}; by default the file's own, or re2tal."
    ),
]


ExactOption = Annotated[
    bool | None,
    typer.Option(
        "--exact/--float", help="Streams in fixed point, inverted bit for bit; by default as the file says."
    ),
]


ArchOption = Annotated[
    str | None,
    typer.Option(help="Name of the model in a file that does not tell: timm's, or torchvision/NAME."),
]


ModelArgsOption = Annotated[
    str | None, typer.Option(metavar="JSON", help="Arguments that build the model: '{\"num_classes\": 10}'.")
]


InputSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW", help="Size of one input, of a clip with its frames; by default the model's own."
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class Amp(str, Enum):
    """Autocast of the forward."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


class Target(str, Enum):
    """What convert writes."""

    rewired = "rewired"
    original = "original"
