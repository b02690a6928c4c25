"""The wheel in clean environments, of the lowest versions declared and the newest: `python -m tests.environments`.

Each environment is a venv of its own that holds the wheel, what it requires and nothing of this checkout. In an empty
folder every command is run there, and `use.py`.
"""

import email
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

from tests.helpers import package
from tests.helpers.programs import ROOT

EXTRAS = {"transformers": "transformers", "torchvision": "tal"}
"""Libraries that revwire knows and does not require, and the extra that declares how old each may be."""
MODEL = "vit_tiny_patch16_224"
COMMANDS = (
    ("--version",),
    ("doctor",),
    ("plan", "resnet18"),
    ("plan", MODEL, "--html", "plan.html"),
    ("verify", "test_vit"),
    ("estimate", MODEL, "--batch", "4"),
    ("convert", "own.safetensors", "--to", "original"),
    ("convert", "own.original.safetensors", "--no-verify", "-o", "again.safetensors"),
)
OF_EXTRAS = {
    "transformers": (("convert", "hf"), ("convert", "hf/model.revwire.safetensors", "--to", "original")),
    "torchvision": (
        ("plan", "torchvision/resnet18"),
        ("convert", "resnet18.pth", "--arch", "torchvision/resnet18"),
    ),
}


def run(call, **options):
    """Run a program that finds nothing of this checkout, not through PYTHONPATH either."""
    outside = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    return subprocess.run(call, check=False, capture_output=True, text=True, env=outside, **options)


def done(*call):
    """What a program writes, which must succeed."""
    ended = run(call)
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, call))}: {ended.stderr}")
    return ended.stdout.strip()


def built(folder):
    """The wheel, from a copy of what it is made of."""
    shutil.copytree(ROOT / "revwire", folder / "revwire", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return package.built("wheel", folder)


def declared(wheel):
    """What the wheel requires, and what it says of the optional libraries that it knows."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (each for each in file.namelist() if each.endswith("dist-info/METADATA"))
        told = email.message_from_bytes(file.read(name)).get_all("Requires-Dist")
    found = []
    for each in map(Requirement, told):
        extra = EXTRAS.get(each.name, "")
        if each.marker is None or (extra and each.marker.evaluate({"extra": extra})):
            found.append(Requirement(f"{each.name}{each.specifier}"))
    return found


def lowest(requirement):
    """The oldest that a requirement admits, with its own corrections: `torch>=2.9` is `torch==2.9.*`."""
    (bound,) = requirement.specifier
    version = Version(bound.version)
    exact = "" if len(version.release) > 2 else ".*"
    return Requirement(f"{requirement.name}=={version.major}.{version.minor}{exact or f'.{version.micro}'}")


def installed(folder, python, wheel, requirements):
    """The Python of a new venv that holds these."""
    done(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    wanted = [f"revwire @ {wheel.as_uri()}", *map(str, requirements)]
    done(own, "-m", "pip", "install", "--quiet", *wanted)
    return own


def beside(folder, wheel):
    """The Python of a new venv that holds the wheel, and takes all else from where this runs."""
    done(sys.executable, "-m", "venv", "--without-pip", folder)
    own = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", own)
    done(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # only now: what is beside has the package too, and pip would leave it at that
    (packages,) = Path(folder, "lib").glob("python*/site-packages")
    (packages / "beside.pth").write_text(f"{Path(typer.__file__).parents[1]}\n", encoding="utf-8")
    return own


def used(python, folder):
    """What fails in an environment, by the command."""
    script = shutil.copy(Path(__file__).with_name("use.py"), folder)
    revwire = str(python.with_name("revwire"))
    of_extras = [call for extra in EXTRAS for call in OF_EXTRAS[extra]]
    calls = [(str(python), script, *EXTRAS), *((revwire, *call) for call in (*COMMANDS, *of_extras))]
    failed = {}
    for call in calls:
        ended = run(call, cwd=folder)
        if ended.returncode:
            failed[" ".join([Path(call[0]).name, *call[1:]])] = (ended.stderr or ended.stdout).strip()[-1500:]
    return failed


def versions(python, names):
    """Of Python and of packages, as they are installed."""
    ask = (
        "import platform, sys; from importlib.metadata import version; "
        "print(platform.python_version(), *(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')"
    )
    return done(python, "-c", ask, *names)


def tried(kind, interpreter, wheel, home):
    """What fails in an environment of a kind, and its versions."""
    requirements = declared(wheel)
    if kind == "here":
        own = beside(home / "venv", wheel)
    else:
        wanted = map(lowest, requirements) if kind == "lowest" else requirements
        own = installed(home / "venv", interpreter, wheel, wanted)
    (home / "empty").mkdir()
    return used(own, home / "empty"), versions(own, [each.name for each in requirements])


KINDS = ("lowest", "newest", "here")


def main(
    kinds: Annotated[list[str] | None, typer.Argument(help=", ".join(KINDS))] = None,
    python: Annotated[list[str] | None, typer.Option(help="Pythons to try; repeatable.")] = None,
) -> None:
    """Install the wheel in clean environments and run every command; exit code 1 where one fails.

    All that is declared: python -m tests.environments lowest newest --python python3.10 --python python3.13

    With what is installed where this runs, within minutes: python -m tests.environments here
    """
    console, any_failed = Console(), False
    with tempfile.TemporaryDirectory() as place:
        (source := Path(place, "source")).mkdir()
        wheel = built(source)
        for kind, interpreter in itertools.product(kinds or KINDS[:2], python or [sys.executable]):
            start = time.monotonic()
            (home := Path(place, "environment")).mkdir()
            failed, told = tried(kind, interpreter, wheel, home)
            shutil.rmtree(home)
            for call, words in failed.items():
                console.print(f"{call}\n{words}", markup=False, highlight=False)
            any_failed |= bool(failed)
            outcome = f"{len(failed)} commands failed" if failed else "all commands ran"
            console.print(
                f"{kind}: {outcome}, {time.monotonic() - start:.0f} s: Python {told}", highlight=False
            )
    raise typer.Exit(1 if any_failed else 0)


if __name__ == "__main__":
    typer.run(main)
