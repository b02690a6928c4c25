"""The documents as a site: links lead somewhere, every public name has its place, nothing is loaded from elsewhere."""

import re

import pytest

import revwire
from tests.helpers.documents import CODE, DOCS, FENCE, PAGES
from tests.helpers.programs import ROOT, python


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    made = {"cli.md", "changelog.md", "contributing.md"} if path.parent == DOCS else set()
    text = CODE.sub("", FENCE.sub("", path.read_text("utf-8")))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target) and target not in made:
            assert (path.parent / target).exists(), target


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: revwire\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(set(revwire.__all__) - {"__version__"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_site_builds_and_every_page_is_in_its_menu(tmp_path):
    build = ["-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = python(*build, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'not included in the "nav"' not in done.stderr
    for page in [path.stem for path in DOCS.glob("*.md")] + ["cli", "changelog", "contributing"]:
        assert (tmp_path / "site" / ("" if page == "index" else page) / "index.html").is_file()
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", _all_html(tmp_path))
    assert [url for url in loaded if "fonts" in url or "cdn" in url] == []


def _all_html(folder):
    return "\n".join(path.read_text("utf-8") for path in folder.rglob("*.html"))
