"""The page of a plan: what it says, and how it behaves in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import timm
import torch
from typer.testing import CliRunner

import revwire
from revwire.cli.app import app
from revwire.cli.page import page
from tests.helpers.vits import NAME, SMALL_VIT, small_vit

CHROMIUM = shutil.which("chromium")


class Read(HTMLParser):
    """Tags in order, the text, and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.loads, self.steps = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [attrs[key] for key in ("src", "href") if key in attrs]
        if "data-step" in attrs:
            self.steps.append(attrs["data-step"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "vit.html"
    model = small_vit()
    plan = revwire.plan(model)
    found = revwire.estimate(model, torch.zeros(4, 3, 32, 32))
    path.write_text(page("a <b>ViT</b> & co", plan, found), "utf-8")
    return path, plan, found


def test_each_step_is_drawn_before_and_after(written):
    path, plan, _ = written
    read = Read(path.read_text("utf-8"))
    names = [step.name for step in plan.steps]
    assert read.steps == names + names
    assert read.tags.count("svg") == 2 * len(plan.chains)


def test_nothing_is_loaded_and_nothing_gets_out_of_its_place(written):
    read = Read(written[0].read_text("utf-8"))
    assert read.loads == ["data:,"]
    assert "a <b>ViT</b> & co" in read.text
    assert not re.search(r"url\(|@import|fetch\(|https?://", written[0].read_text("utf-8"))


def test_bars_are_as_long_as_what_they_show(written):
    path, _, found = written
    text = path.read_text("utf-8")
    parts = ("model", "gradients", "optimizer", "activations")
    most = max(sum(getattr(row, part) for part in parts) for row in found.rows)
    widths = [float(w) for w in re.findall(r"style=\"width:([0-9.]+)%\"", text)]
    wanted = [100 * getattr(row, part) / most for row in found.rows for part in parts]
    assert widths == pytest.approx(wanted, abs=1e-3)


def test_what_is_left_alone_is_said():
    model = timm.create_model("resnet18")
    plan = revwire.plan(model)
    read = Read(page("resnet18", plan))
    assert plan.skipped
    for place in plan.skipped:
        assert place.module in read.text
        assert place.reason in read.text
    assert "Where the memory" not in read.text


def test_a_model_with_nothing_to_rewire_has_a_page():
    plan = revwire.plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.zeros(2, 4))
    assert "Nothing of it is rewired" in page("linear", plan)


def test_the_command_writes_it(tmp_path):
    out = tmp_path / "report.html"
    call = ["plan", NAME, "--model-args", json.dumps(SMALL_VIT), "--batch", "2", "--html"]
    told = CliRunner().invoke(app, [*call, str(out)])
    assert told.exit_code == 0, told.output
    assert "2 x 3 x 32 x 32" in Read(out.read_text("utf-8")).text
    told = CliRunner().invoke(app, [*call, str(tmp_path / "no" / "report.html")])
    assert told.exit_code == 1
    assert "cannot write" in told.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(written, scheme, width):
    from playwright.sync_api import sync_playwright

    path, plan, _ = written
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        paper = "getComputedStyle(document.body).backgroundColor"
        first = tab.evaluate(paper)
        assert (first == "rgb(255, 255, 255)") == (scheme == "light")
        # the page itself does not scroll sideways, on a phone either: only its wide pictures do
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        step = plan.steps[0]
        tab.locator(".step").nth(0).click()
        told = tab.locator("#told")
        assert told.is_visible()
        assert step.name in told.inner_text()
        assert step.line in told.inner_text()
        assert tab.locator(".step.chosen").count() == 2
        tab.locator(".step").nth(1).focus()
        tab.keyboard.press("Enter")
        assert list(plan.steps)[1].name in told.inner_text()
        tab.locator("#theme").click()
        assert tab.evaluate(paper) != first
        tab.locator("summary").first.click()
        assert tab.locator("details[open] li").count() > 0
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
