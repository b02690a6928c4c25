"""The commands of the documents, of docstrings and of `--help` are understood; none of them runs here."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

from benchmarks.shared.strategies import STRATEGIES as MEASURED
from examples.re2tal.config import read_config
from revwire.checkpoint.hub import is_hub
from revwire.cli.app import app
from revwire.cli.models import _FILE_SUFFIXES
from revwire.cli.values import parse_arguments, parse_size
from revwire.libraries import Architecture
from revwire.measure.strategies import STRATEGIES
from revwire.printing import size_of
from revwire.run.coupling import coupling_of
from tests.helpers.documents import CODE, DOCS, FENCE, PAGES, fences
from tests.helpers.programs import ROOT

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
        ("cli.md", command_page()),
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
        group = typer.main.get_command(app)
        context = group.make_context("revwire", [], resilient_parsing=True)
        if rest[0] in {"--help", "--version", "[OPTIONS]"}:  # the last is in the synopses of --help
            return
        name, *rest = rest
        command = group.get_command(context, name)
        assert command is not None, f"revwire has no command {name}"
        parse(command, rest, whole=whole, parent=context)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets), f"no targets {set(rest) - set(targets)}"
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
            asked = set(found[1].split(","))
            assert asked <= set(extras), f"no extras {asked - set(extras)}"


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
    known, asked = set(STRATEGIES if "parent" in of_context else MEASURED), set(told.get("strategy") or ())
    assert asked <= known, f"no strategies {asked - known}"
    parse_arguments(told.get("model_args"))
    parse_size(told.get("input_size"))
    for name in [told["config"]] if "config" in told else told.get("configs", []):
        if Path(name).suffix != ".yaml":  # a file of the reader's own
            read_config(name, told.get("overrides") or [])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("revwire plan resnet50 --htm x.html", "plan has no {'--htm'}"),
        ("revwire plan resnet_50", "resnet_50"),
        ("revwire plans resnet50", "revwire has no command plans"),
        ("revwire plan --htm", "plan has no {'--htm'}"),
        ("revwire plan resnet50 --coupling revtal", "unknown coupling 'revtal'"),
        ("revwire estimate resnet50 -b none", "Input should be a valid integer"),
        ("revwire estimate resnet50 -s rewire", "no strategies {'rewire'}"),
        ("python -m benchmarks.none", "No module named 'benchmarks.none'"),
        ("python -m benchmarks.depth --sizes 3", "main has no {'--sizes'}"),
        ("python -m benchmarks.make_index --fresh", "main has no {'--fresh'}"),
        ("python -m examples.re2tal.train synthetic optim.epoch=3", "optim.epoch: there is no such setting"),
        ("torchrun --node 2 -m examples.re2tal.train synthetic", "ambiguous option: --node"),
        (
            "torchrun --nnodes 2 -m examples.re2tal.train synthetic parallel=fsdp",
            "should be 'ddp' or 'fsdp2'",
        ),
        ("make all", "no targets {'all'}"),
        ("pip install '.[every]'", "no extras {'every'}"),
        ("curl example.org", "say how ['curl', 'example.org'] is to be checked"),
    ],
)
def test_a_command_that_is_not_there_is_found(line, says, capsys):
    with pytest.raises((Exception, SystemExit)) as caught:
        check(words_of(line), whole=True)
    assert says in f"{caught.value} {capsys.readouterr().err}"
