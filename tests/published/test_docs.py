"""The documents: their code runs, commands are understood, links lead somewhere, figures are measured.

Every python block of every page is executed, a page's blocks from top to bottom in one namespace; a new page and a new
block are covered as they are written. Nothing is skipped: what cannot be had in a test is replaced, in `stand_ins`.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
import typer
import yaml
from torch.distributed.run import get_args_parser

import revwire
from benchmarks import finetune, record, sizing
from benchmarks.strategies import STRATEGIES as MEASURED
from examples.re2tal.config import read_config
from revwire.checkpoint.hub import is_hub
from revwire.cli.app import app
from revwire.cli.models import _FILE_SUFFIXES
from revwire.cli.values import parse_arguments, parse_size
from revwire.libraries import Architecture
from revwire.measure.estimate import size_of
from revwire.measure.strategies import STRATEGIES
from revwire.run.coupling import coupling_of
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


# --- code


# what a page has to print, where it says so
PRINTED = {
    "README.md": ["4 steps in 1 chain", "fits 24 GiB"],
    "index.md": ["4 steps in 1 chain", "fits 2 GiB"],
    "memory.md": ["autocast bfloat16", "fits 24 GiB"],
    "own-models.md": ["12 steps in 1 chain"],
    "integrations.md": ["torch.Size([8, 17, 48])", "Total params"],
}
# torch's own: what it deprecates and calls, and one process with itself on the CPU
WARNED = {
    "integrations.md": [
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:The .grad attribute of a Tensor:UserWarning",
    ],
}


@pytest.fixture
def stand_ins(monkeypatch):
    """No connection is made: pretrained weights are random ones; and timm's ViTs have two blocks, for speed."""
    create, built = timm.create_model, timm.models.is_model_pretrained

    def untrained(name, *args, pretrained=False, **kwargs):
        assert not pretrained or built(name), f"timm has no weights for {name}"
        few = {"depth": 2, **kwargs} if name.startswith("vit_") else kwargs
        return create(name, *args, **few)

    def from_pretrained(name):
        assert name == "facebook/dinov2-base", f"say here what stands in for {name}"
        torch.manual_seed(0)
        small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 32}
        return transformers.Dinov2Model(transformers.Dinov2Config(image_size=224, **small))

    def offline(*_):
        raise AssertionError("a document's code loads something: say in stand_ins what takes its place")

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(socket.socket, "connect", offline)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.filterwarnings(w) for w in WARNED.get(p.name, [])])
        for p in PAGES
        if blocks(p)
    ],
)
def test_code_blocks_run(path, capsys, monkeypatch, tmp_path, stand_ins):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    for index, code in enumerate(blocks(path)):
        exec(compile(code, f"{path.name}, block {index + 1}", "exec"), namespace)
    printed = capsys.readouterr().out
    for text in PRINTED.get(path.name, []):
        assert text in printed


# --- commands

SHELL = ("console", "sh", "bash", "shell")
OTHER = (
    "python",
    "yaml",
    "json",
    "toml",
    "text",
    "",
)  # an untagged block shows what is printed, commands too
WORDS = ("revwire", "python", "torchrun", "make", "pip")
THEIRS = {"pip", "pytest", "mkdocs", "venv"}  # run with python -m, and not ours to check
PLACEHOLDER = re.compile(r"[A-Z_]+")


def command_page():
    """The site's page of the command line, which holds the examples of `--help`."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.command_line()


def docstrings():
    """Those of the examples and benchmarks, by file."""
    for folder in ("examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            nodes = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]
            yield path, "\n".join(filter(None, map(ast.get_docstring, nodes)))


def words_of(line):
    """The words of a command, without prompt, comment and settings of the environment."""
    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    return words


def commands():
    """(where, words, whole) of every command that is shown: whole lines of blocks, and what is named in a text."""
    for where, text in [
        *((path.name, path.read_text("utf-8")) for path in PAGES),
        ("app.md", command_page()),
    ]:
        for line in lines_of_shell(where, text):
            yield where, words_of(line), True
        for span in CODE.findall(FENCE.sub("", text)):
            if span.split(" ")[0] in WORDS and " " in span:
                yield where, words_of(span), False
    for path, text in docstrings():
        for line in re.findall(r"^(?: {4}|Example: )((?:python -m|torchrun) .*)", text, re.MULTILINE):
            yield path.relative_to(ROOT).as_posix(), words_of(line), True


def lines_of_shell(where, text):
    for language, code in fences(text):
        assert language in (*SHELL, *OTHER), f"{where}: nothing checks a block of {language}"
        for line in code.replace("\\\n", " ").splitlines():
            typed = line.startswith("$ ") if language == "console" else language in SHELL
            if (typed or (language == "" and line.split(" ")[0] in WORDS)) and words_of(line):
                yield line


COMMANDS = list(dict.fromkeys((where, tuple(words), whole) for where, words, whole in commands()))


@pytest.mark.parametrize(("where", "words", "whole"), COMMANDS, ids=lambda value: str(value)[:60])
def test_commands_are_understood(where, words, whole):
    """Programs, modules, targets and extras exist, options are parsed, names and settings are known; nothing runs."""
    check(list(words), whole=whole)


def check(words, *, whole):
    program, *rest = words
    if program == "revwire":
        group = typer.main.get_command(app.app)
        context = group.make_context("revwire", [], resilient_parsing=True)
        if rest[0] in {"--help", "--version", "[OPTIONS]"}:  # the last is in the synopses of --help
            return
        name, *rest = rest
        command = group.get_command(context, name)
        assert command is not None, f"revwire has no command {name}"
        parse(command, rest, whole=whole, parent=context)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "pip":
        check_pip(rest)
    elif program == "torchrun":
        told = get_args_parser().parse_args(rest)
        assert told.module, "give the module with -m"
        check_module([told.training_script, *told.training_script_args], whole=whole)
    else:
        assert (program, rest[0]) == ("python", "-m"), f"say how {words} is to be checked"
        check_module(rest[1:], whole=whole)


def check_pip(words):
    assert words[0] == "install"
    text = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", text.partition("\n[")[0], re.MULTILINE)
    for word in words:
        if found := re.fullmatch(r"(?:\.|revwire)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras)


def check_module(words, *, whole):
    name, *rest = words
    if name in THEIRS:
        return
    if name == "revwire":
        check(words, whole=whole)
        return
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if "typer.run(main)" not in Path(module.__file__).read_text("utf-8"):
        assert rest == [], f"{name} takes no arguments"
        return
    app = typer.Typer(add_completion=False)
    app.command()(module.main)
    parse(typer.main.get_command(app), rest, whole=whole)


def parse(command, words, *, whole, **of_context):
    """Parse as the command itself would, and look at what a command looks at first."""
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    named = {word.partition("=")[0] for word in words if re.match(r"-[-a-z]", word)}
    assert named <= options, f"{command.name} has no {named - options}"
    if words[:1] in (["--help"], ["[OPTIONS]"]) or (not whole and not any(word[0] != "-" for word in words)):
        return  # in a text a command may be named without its arguments
    told = command.make_context(command.name, words, **of_context).params
    if (model := told.get("model")) and isinstance(model, str) and not PLACEHOLDER.fullmatch(model):
        assert Path(model).suffix in _FILE_SUFFIXES or is_hub(model) or Architecture.of(model).exists(), model
    if told.get("arch"):
        assert Architecture.of(told["arch"]).exists()
    if told.get("coupling"):
        coupling_of(told["coupling"])
    if told.get("limit"):
        size_of(told["limit"])
    known = STRATEGIES if "parent" in of_context else MEASURED
    assert set(told.get("strategy") or ()) <= set(known)
    parse_arguments(told.get("model_args"))
    parse_size(told.get("input_size"))
    for name in [told["config"]] if "config" in told else told.get("configs", []):
        if Path(name).suffix != ".yaml":  # a file of the reader's own
            read_config(name, told.get("overrides") or [])


@pytest.mark.parametrize(
    "line",
    [
        "revwire plan resnet50 --htm x.html",
        "revwire plan resnet_50",
        "revwire plans resnet50",
        "revwire plan --htm",
        "revwire plan resnet50 --coupling revtal",
        "revwire estimate resnet50 -b none",
        "revwire estimate resnet50 -s rewire",
        "python -m benchmarks.none",
        "python -m benchmarks.depth --sizes 3",
        "python -m benchmarks.make_index --fresh",
        "python -m examples.re2tal.train synthetic optim.epoch=3",
        "torchrun --node 2 -m examples.re2tal.train synthetic",
        "torchrun --nnodes 2 -m examples.re2tal.train synthetic parallel=fsdp",
        "make all",
        "pip install '.[every]'",
        "curl example.org",
    ],
)
def test_a_command_that_is_not_there_is_found(line, capsys):
    with pytest.raises((Exception, SystemExit)):
        check(words_of(line), whole=True)


def test_yaml_and_json_blocks_can_be_read():
    for path in PAGES:
        for language, code in fences(path.read_text("utf-8")):
            if language in {"yaml", "json"}:
                (yaml.safe_load if language == "yaml" else json.loads)(code)


# --- links, figures

REWIRED = ("rewired", "transitions", "lean")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    made = {"app.md", "changelog.md", "contributing.md"} if path.parent == DOCS else set()
    text = CODE.sub("", FENCE.sub("", path.read_text("utf-8")))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target) and target not in made:
            assert (path.parent / target).exists(), target


def test_the_readme_s_tables_of_bytes_and_seconds_are_those_of_the_committed_runs():
    def rows_of(name):
        return json.loads((record.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]

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


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: revwire\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(set(revwire.__all__) - {"__version__"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_site_builds_and_every_page_is_in_its_menu(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 'not included in the "nav"' not in done.stderr
    for page in [path.stem for path in DOCS.glob("*.md")] + ["cli", "changelog", "contributing"]:
        assert (tmp_path / "site" / ("" if page == "index" else page) / "index.html").is_file()
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?://[^\" >]+)", _all_html(tmp_path))
    assert [url for url in loaded if "fonts" in url or "cdn" in url] == []


def _all_html(folder):
    return "\n".join(path.read_text("utf-8") for path in folder.rglob("*.html"))
