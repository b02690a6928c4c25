"""The pages of the documentation, and what is in them."""

import re

from tests.helpers.programs import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")


def fences(text):
    """(language, code) of each fenced block."""
    return [(language.split()[0] if language.strip() else "", code) for language, code in FENCE.findall(text)]


def blocks(path):
    return [code for language, code in fences(path.read_text("utf-8")) if language == "python"]
