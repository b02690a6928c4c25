"""Names from files on the terminal: shown, never obeyed."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from typer.testing import CliRunner

from revwire.cli.app import app
from revwire.cli.terminal import Terminal, shown
from tests.helpers.checkpoints import vit

TITLE = "\x1b]0;owned\x07"
CONTROLS = {chr(i) for i in (*range(32), *range(127, 160))} - {"\t", "\n"}


@given(st.text())
def test_what_is_shown_holds_no_command(text):
    told = shown(text)
    assert not CONTROLS & set(told)
    assert "\u202e" not in told
    if not any(ord(c) < 32 or ord(c) > 126 for c in text):
        assert told == text


@pytest.mark.parametrize("colour", [False, True])
def test_tables_and_texts_keep_their_colours_and_nothing_elses(colour):
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=colour, width=60, color_system="standard" if colour else None)
    table = Table(title=f"t{TITLE}")
    table.add_column(f"h{TITLE}")
    table.add_row(Text(f"c{TITLE}"))
    console.print(table)
    console.print(f"[red]r{TITLE}[/]")
    with console.status(f"s{TITLE}"):
        pass
    assert "\x1b]0" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert ("\x1b[31m" in out.getvalue()) is colour


def test_a_tensor_name_with_a_command_in_it(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {f"{TITLE}{name}": tensor for name, tensor in vit().state_dict().items()}
    save_file(state, path, {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps({"depth": 2})})
    for call in (["convert", str(path)], ["plan", str(path)], ["verify", str(path)]):
        told = CliRunner().invoke(app, call)
        assert told.exit_code == 1
        assert "\x1b" not in told.output
        assert "\\x1b]0;owned" in told.output
