"""What is shipped: a wheel with the package and nothing else, an sdist that makes the same wheel."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import revwire

ROOT = Path(__file__).parent.parent


def build(source, out, kind):
    command = [sys.executable, "-W", "error", "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The wheel of an unpacked sdist, and the sdist, built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    left = shutil.ignore_patterns(".*", "build", "data", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left)
    sdist = build(copy, folder / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build(unpacked, folder / "wheel", "wheel"), sdist


def test_the_wheel_holds_the_package_and_all_of_it(shipped):
    with zipfile.ZipFile(shipped[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = (path for path in (ROOT / "revwire").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {path.relative_to(ROOT).as_posix() for path in here}


def test_the_metadata_is_the_project_s(shipped):
    with zipfile.ZipFile(shipped[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(wheel.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert metadata["Version"] == revwire.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "# revwire" in metadata.get_payload()
    required = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"rich", "safetensors", "timm", "torch", "typer"}


def test_the_package_imports_nothing_that_it_does_not_require():
    """Besides Python's own: torch, timm and what they need, and optional parts where they are asked for."""
    allowed = {"huggingface_hub", "matplotlib", "numpy", "rich", "revwire", "safetensors", "timm", "torch"}
    allowed |= {"torchvision", "typer", "typing_extensions", "click", "yaml"}
    for path in (ROOT / "revwire").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                root = name.partition(".")[0]
                assert root in allowed or root in sys.stdlib_module_names, f"{path}: {name}"
