"""What is published: the wheel holds the package and nothing else, the sdist all that the tests need."""

import ast
import email
import shutil
import sys
import tarfile
import zipfile

import pytest

from tests.helpers import package
from tests.helpers.programs import ROOT

TRACKED = ("revwire", "tests", "benchmarks", "examples", "docs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.partial.jsonl", "*.revwire.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both files."""
    folder = tmp_path_factory.mktemp("package")
    for name in TRACKED:
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return package.built("wheel", folder), package.built("sdist", folder)


def sources(folder):
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}


def tracked(*folders):
    wanted = set().union(*map(sources, folders))
    return {
        p
        for p in wanted
        if "__pycache__" not in p and not p.endswith((".pyc", ".partial.jsonl", ".revwire.safetensors"))
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == tracked("revwire")
    for name in ("py.typed", "checkpoint/timm_index.json.gz", "cli/page/template.html", "cli/page/style.css"):
        assert f"revwire/{name}" in names
    assert any(name.endswith("/licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_need(built):
    with tarfile.open(built[1]) as file:
        names = {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}
    assert tracked(*TRACKED) <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= names
    assert not any("__pycache__" in name for name in names)


@pytest.mark.slow
def test_the_metadata_say_what_it_is_and_what_it_needs(built):
    with zipfile.ZipFile(built[0]) as file:
        (name,) = (n for n in file.namelist() if n.endswith("dist-info/METADATA"))
        told = email.message_from_bytes(file.read(name))
        (entry,) = (n for n in file.namelist() if n.endswith("dist-info/entry_points.txt"))
        assert "revwire = revwire.cli.app:main" in file.read(entry).decode()
    assert (told["Name"], told["License-Expression"]) == ("revwire", "MIT")
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload().startswith("# revwire")
    assert "\n" not in told["Summary"]
    needed = [n for n in told.get_all("Requires-Dist") if "extra ==" not in n]
    assert sorted(n.partition(">=")[0] for n in needed) == [
        "annotated-types",
        "pydantic",
        "rich",
        "safetensors",
        "timm",
        "torch",
        "typer",
    ]


def test_the_package_imports_nothing_that_it_does_not_require():
    """Besides Python's own: torch, timm and what they need, and optional parts where they are asked for."""
    allowed = {"huggingface_hub", "matplotlib", "numpy", "rich", "revwire", "safetensors", "timm", "torch"}
    allowed |= {"torchvision", "typer", "typing_extensions", "click", "yaml", "pydantic", "annotated_types"}
    for path in (ROOT / "revwire").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                root = name.partition(".")[0]
                assert root in allowed or root in sys.stdlib_module_names, f"{path}: {name}"
