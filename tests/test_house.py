"""The house as a plan: which room may import which. CONTRIBUTING's table is this data in words.

All imports count, also those inside functions and under TYPE_CHECKING: whoever reads a file follows them all.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").exists():
    ROOT = ROOT.parent
PACKAGE = ROOT / "revwire"

# from the top: a room imports only from itself and from rooms below it
ORDER = (
    "__init__",
    "__main__",
    "cli",
    "checkpoint",
    "api",
    "measure",
    "rewrite",
    "experimental",
    "planning",
    "find",
    "trace",
    "run",
    "libraries",
    "printing",
    "pytree",
    "_torch",
    "version",
    "errors",
)
# what the memory-free backward may know: nothing of planning, tracing or of anybody's models
RUN_KNOWS = {"run", "pytree", "_torch", "errors"}
LIBRARIES = {"timm", "torchvision", "transformers"}
LONG_FILE, LONG_FUNCTION = 350, 60


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = ("revwire", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    known = set(map(module_of, files()))
    found = set[str]()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & known
            if below - known:
                found.add(node.module)
    return found - {module_of(path)}


@functools.cache
def arrows() -> dict[str, set[str]]:
    return {module_of(path): imported(path) for path in files()}


def test_every_file_stands_in_a_room_of_the_plan():
    assert {room_of(module) for module in arrows()} == set(ORDER)
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_imports_only_go_down():
    floor = {room: i for i, room in enumerate(ORDER)}
    climbing = {
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in others
        if floor[room_of(other)] < floor[room_of(module)]
    }
    assert not climbing


def test_no_file_imports_itself_through_others():
    waiting = {module: set(others) for module, others in arrows().items()}
    while done := {module for module, others in waiting.items() if not others & waiting.keys()}:
        waiting = {module: others for module, others in waiting.items() if module not in done}
    # what is left either is in a circle or imports one
    circles = {m for m, others in waiting.items() if any(m in reached(o) for o in others)}
    assert not circles


def reached(module: str) -> set[str]:
    seen, waiting = set[str](), [module]
    while waiting:
        if (at := waiting.pop()) not in seen:
            seen.add(at)
            waiting += arrows()[at]
    return seen


def test_running_knows_nothing_of_tracing_and_planning():
    known = {
        room_of(other) for module, others in arrows().items() if room_of(module) == "run" for other in others
    }
    assert known <= RUN_KNOWS


def test_libraries_are_named_in_their_room_alone():
    named = []
    for path in files():
        if room_of(module_of(path)) == "libraries":
            continue
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            # as a word of its own, in code: prose may speak of them
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            named += [f"{path}:{node.lineno}" for name in names if name.partition(".")[0] in LIBRARIES]
    assert not named


def test_private_modules_of_torch_are_named_in_one_file_alone():
    found = []
    for path in files():
        if path.name == "_torch.py":
            continue
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += (
                [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            )
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            found += [f"{path}:{node.lineno} {n}" for n in names if re.match(r"torch\.(\w+\.)*_[a-zA-Z]", n)]
    assert not found


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_long_files_and_functions_say_why(path):
    """A reason stands in the file's first comment, or in the function's."""
    text = path.read_text("utf-8")
    if len(text.splitlines()) > LONG_FILE:
        assert re.search(r"^# long: ", text, re.MULTILINE), f"{path} has {len(text.splitlines())} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONG_FUNCTION:
            body = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            assert "# long: " in body, f"{path}:{node.lineno} {node.name}"


def test_contributing_tells_the_same_rooms():
    table = re.findall(r"^\| `(\w+)(?:/|\.py)?`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert tuple(table) == tuple(room for room in ORDER)
