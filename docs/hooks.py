"""Pages of the site that are made from other files: the command line's, the changelog, how to contribute.

Results and sources that a page links to lie outside of the site: pictures are copied, other links become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from revwire.cli.app import app

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#]+|docs/[^)#]+|[A-Za-z]+\.md)(#[^)]*)?\)")
_OWN = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated."""
    pages = {
        "cli.md": command_line(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead to the page of the site, to the copied picture, or nowhere."""
    return _LINK.sub(_relinked, markdown)


def _relinked(found: re.Match[str]) -> str:
    shown, text, target, _ = found.groups()
    path = Path(target)
    if path.name in _OWN:
        return f"[{text}]({_OWN[path.name]})"
    if path.suffix == ".png":
        return f"{shown}[{text}](results/{path.name})"
    if path.parts[:1] == ("docs",):
        return f"[{text}]({path.name})"
    return text if target.startswith("../") else found.group()


def command_line() -> str:
    """The reference of all commands, from the program itself."""
    command = typer.main.get_command(app)
    context = command.make_context("revwire", ["--help"], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="revwire")
    for name in command.list_commands(context):  # the list of commands cuts their descriptions short
        described = command.get_command(context, name).get_short_help_str(limit=200)
        text = re.sub(rf"^\* `{name}`: .*$", f"* `{name}`: {described}", text, flags=re.MULTILINE)
    # an example belongs into a box of its own
    return re.sub(r"\n\s*Example: (.+)\n", lambda m: _examples(m[1]), text + "\n")


def _examples(text: str) -> str:
    lines = "\n".join(f"$ {line.strip()}" for line in text.split("; "))
    return f"\n**Examples**:\n\n```console\n{lines}\n```\n"
