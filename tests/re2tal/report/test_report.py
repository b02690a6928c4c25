import json
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from examples.re2tal.data.annotations import read_annotations
from examples.re2tal.evaluation.metrics import THUMOS, Matches, evaluate
from examples.re2tal.evaluation.postprocess import Detections, write_submission
from examples.re2tal.report import __main__ as command
from examples.re2tal.report.page import _curves, write_report
from tests.re2tal import tiny

CHROMIUM = shutil.which("chromium")


@pytest.mark.parametrize("positives", [7, 300])
def test_the_area_under_the_drawn_steps_is_the_average_precision(positives):
    """Also where most detections are false, and of more true ones than are drawn: then a little less."""
    random = np.random.default_rng(positives)
    hits = np.zeros((1, 4000), dtype=bool)
    hits[0, random.choice(600, positives, replace=False)] = True
    matches = Matches(np.linspace(1, 0, 4000), hits, positives + 2, ())
    (corners,) = _curves(matches)
    recall, precision = np.array(corners).T
    area = (np.diff(recall, prepend=0) * precision).sum()
    (wanted,) = matches.average_precision()
    assert len(corners) <= 80
    assert wanted - (0 if positives == 7 else 0.01) - 1e-3 <= area <= wanted + 1e-3


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tiny.data(tmp_path_factory.mktemp("report"), 1, 3)
    truth = read_annotations(folder / "annotations.json")
    random = np.random.default_rng(0)
    results = {}
    for video in truth.subset("validation"):
        rows = [
            (a.start + random.normal(0, 0.3), a.end, 0.9, truth.classes.index(a.label)) for a in video.actions
        ]
        rows += [(1.0, 4.0, 0.15, 0)]
        results[video.id] = Detections.of([r[:2] for r in rows], [r[2] for r in rows], [r[3] for r in rows])
    path = folder / "report.html"
    history = [{"step": i, "loss": 1 / i} for i in range(1, 30)] + [{"step": 29, "average_mAP": 0.5}]
    evaluation = write_report(
        path,
        truth,
        results,
        subset="validation",
        tiou=THUMOS,
        videos=folder / "videos",
        history=history,
        title="<b>run</b>",
    )
    write_submission(folder / "predictions.json", results, truth.classes)
    return path, truth, results, evaluation


def test_the_page_holds_what_evaluation_finds(page):
    path, truth, results, evaluation = page
    wanted = evaluate(truth, results, subset="validation", tiou=THUMOS)
    assert np.array_equal(evaluation.ap, wanted.ap)
    text = path.read_text()
    assert "<b>run</b>" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert np.allclose(np.array(data["ap"]).T, wanted.ap)
    assert all(len(video["pictures"]) == 8 for video in data["videos"])


def test_the_command_writes_it(page):
    path, *_, evaluation = page
    app = typer.Typer()
    app.command()(command.main)
    out = path.with_name("other.html")
    files = [path.with_name("annotations.json"), path.with_name("predictions.json"), out]
    result = CliRunner().invoke(app, [*map(str, files), "--tiou", "0.3:0.1:0.7"])
    assert result.exit_code == 0, result.output
    assert f"{evaluation.average_mAP:.4f}" in result.output
    assert out.exists()


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize("width", [375, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(page, width, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    path, truth, _, evaluation = page
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on(
            "request", lambda request: errors.append(request.url) if request.url.startswith("http") else None
        )
        tab.goto(path.as_uri())
        assert tab.locator("dd").first.inner_text() == f"{evaluation.average_mAP:.3f}"
        assert tab.locator("#ap tr").count() == len(evaluation.classes) + 2
        assert f"average precision {evaluation.ap[0, 0]:.3f}" in tab.locator("#curve").text_content()
        tab.select_option("#tiou", "4")
        assert f"average precision {evaluation.ap[4, 0]:.3f}" in tab.locator("#curve").text_content()
        video = truth.subset("validation")[0]
        assert tab.locator("#timeline image").count() == 8
        assert tab.locator("#timeline .action").count() == len(video.actions)
        assert tab.locator("#timeline .found").count() == len(video.actions)
        tab.locator("#least").fill("0.1")
        assert tab.locator("#timeline .found").count() == len(video.actions) + 1
        assert tab.locator("#loss path.curve").count() == 1
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.locator("#theme").click()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        browser.close()
    assert errors == []
