"""Imports of the example go one way: a file knows what comes before it in the table of docs/re2tal.md, and no more."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "re2tal"
ROOMS = re.findall(
    r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "docs" / "re2tal.md").read_text("utf-8"), re.MULTILINE
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in EXAMPLE.rglob("*.py")
}


def imported(path):
    """The files of the example that one imports: anywhere in it, for types only as well."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("examples.re2tal"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


def test_the_table_names_every_room():
    assert set(ROOMS) >= {path.parent.name for path in EXAMPLE.glob("*/__init__.py")}
    assert all((EXAMPLE / room).is_dir() or (EXAMPLE / f"{room}.py").is_file() for room in ROOMS)


def test_no_file_imports_itself_by_way_of_others():
    list(TopologicalSorter({name: set(imported(path)) for name, path in FILES.items()}).static_order())


def test_a_room_imports_only_those_before_it():
    for name, path in FILES.items():
        room = name.removeprefix("examples.re2tal").split(".")[1:2]
        if room and room[0] in ROOMS:
            known = ROOMS[: ROOMS.index(room[0]) + 1]
            assert {other.split(".")[2] for other in imported(path)} <= set(known), name
