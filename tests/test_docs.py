"""The code in the documents runs, and their figures are those of the result files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import finetune, record

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["own-models.md"])
def test_code_blocks_run(name, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    assert "12 steps in 1 chain" in capsys.readouterr().out


def test_the_accuracies_of_the_couplings_are_those_of_the_committed_runs():
    """Every figure of the table in docs/couplings.md is computed from the result file again."""
    document = json.loads((record.RESULTS / "finetune.json").read_text(encoding="utf-8"))
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
