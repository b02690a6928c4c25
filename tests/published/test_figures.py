"""The figures of the documents are those of the committed runs."""

import json

import pytest

from benchmarks import finetune, sizing
from benchmarks.shared import result_files
from tests.helpers.documents import DOCS
from tests.helpers.programs import ROOT

REWIRED = ("rewired", "transitions", "lean")


def test_the_readme_s_tables_of_bytes_and_seconds_are_those_of_the_committed_runs():
    def rows_of(name):
        return json.loads((result_files.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]

    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    cases = {}
    for row in rows_of("memory-cpu-none"):
        cases.setdefault(row["case"].replace(" batch", ""), {})[row["strategy"]] = row
    for case, ways in cases.items():
        peaks = [ways[way].get("peak_bytes") for way in ("plain", "checkpoint", *REWIRED)]
        shown = ["-" if peak is None else f"{peak / 2**20:.3g}" for peak in peaks]
        shown = [f"{float(peak):.1f}" if peak != "-" and float(peak) < 100 else peak for peak in shown]
        times = [ways[way].get("ratio_to_plain") for way in ("checkpoint", *REWIRED)]
        ratios = ["-" if ratio is None else f"{ratio['seconds']:.2f}" for ratio in times]
        to_checkpoint = (
            f"{ways[way]['ratio_to_checkpoint']['seconds']:.2f}" for way in ("rewired", "budget=checkpoint")
        )
        cells = (case, " / ".join(shown), ", ".join(ratios), *to_checkpoint)
        assert f"| {' | '.join(cells)} |" in readme
    for row in rows_of("peers-cpu-float32"):
        ratio = row.get("ratio_to_plain", {"seconds": 1})["seconds"]
        sizes = (row[key] / 2**20 for key in ("held_bytes", "peak_bytes"))
        assert f" | {' | '.join([f'{ratio:.2f}', *(f'{size:.1f}' for size in sizes)])} |" in readme, row


def test_the_accuracies_of_the_couplings_are_those_of_the_committed_runs():
    """Every figure of the table in docs/couplings.md is computed from the result file again."""
    document = json.loads((result_files.RESULTS / "finetune.json").read_text(encoding="utf-8"))
    assert all(len(seeds) == 5 for seeds in document["runs"].values())
    ways = ("plain", *(f"{c}, exact" for c in finetune.COUPLINGS), *(w.name for w in finetune.WAYS[-3:]))
    text = (DOCS / "couplings.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "±" in line and line.startswith("|")]
    assert len(lines) == len(ways)
    by_model = [finetune.by_way(document, model) for model in ("vit", "resnet")]
    for way in ways:
        found = (finetune.mean_and_spread(runs[way], e) for runs in by_model for e in finetune.SHOWN)
        figures = " | ".join(f"{mean:.1f} ± {spread:.1f}" for mean, spread in found)
        assert any(line.endswith(f"| {figures} |") for line in lines), way
    best = max(finetune.mean_and_spread(by_model[0][w], 10)[0] for w in ways[2:5])
    assert best >= finetune.mean_and_spread(by_model[0]["plain"], 10)[0] - 0.5


@pytest.mark.slow
def test_the_sizes_of_large_models_are_those_of_the_committed_run():
    document = json.loads(sizing.PATH.read_text("utf-8"))
    text = (DOCS / "distributed.md").read_text("utf-8")
    for lines in (sizing.table(document["rows"]), sizing.checked_table(document["checked"]["rows"])):
        assert "\n".join(["", *lines, ""]) in text
    assert all(1 <= row["predicted"] / row["measured"] < 1.3 for row in document["checked"]["rows"])
    # and the run is what would be found today
    (row,) = (
        r for r in document["rows"] if (r["model_name"], r["way"]) == ("vit_large_patch16_224", "rewired")
    )
    assert sizing.sized("vit_large_patch16_224", row["batch"], "rewired") == row
