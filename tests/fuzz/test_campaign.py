"""Some minutes of the campaign, on other files each day; and that it finds what it is for."""

import datetime as dt
import random

import pytest
import torch

from revwire import checkpoint
from revwire.errors import CheckpointError
from tests.fuzz import __main__ as campaign
from tests.fuzz.mutate import FORMATS, corpus, spoilt
from tests.helpers.programs import python


@pytest.mark.slow
def test_spoilt_files_are_refused_or_taken(tmp_path):
    seed = dt.datetime.now(tz=dt.timezone.utc).toordinal() * 100_000
    call = ("-m", "tests.fuzz", "--seed", seed, "--seconds", 150, "--jobs", 1, "--kept", tmp_path / "found")
    done = python(*call, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "refused" in done.stdout


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "corpus"
    made.mkdir()
    return made, corpus(made)


def test_every_format_is_whole_and_every_seed_the_same_file(folder, tmp_path):
    _, files = folder
    place = tmp_path / "alone"
    assert [path.name for path in files] == list(FORMATS)
    for path in files:
        place.mkdir()
        assert "taken" in campaign.tried(path.rename(place / path.name))
        (place / path.name).rename(path)
        place.rmdir()
        ways = [spoilt(path, tmp_path / f"{i}{path.suffix}", random.Random(7)) for i in range(2)]
        assert ways[0] == ways[1]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda path: 1 / 0, "FOUND ZeroDivisionError"),
        (lambda path: path.with_name("litter").touch(), "FOUND AssertionError: left behind"),
        (lambda path: torch.ones(2**29), "FOUND 20"),
    ],
)
def test_a_fault_is_found_and_its_file_kept(folder, tmp_path, monkeypatch, fault, words):
    made, _ = folder
    kept = tmp_path / "kept"
    kept.mkdir()

    def read(path):
        fault(path)
        raise CheckpointError("as it should")

    monkeypatch.setattr(checkpoint, "load", read)
    outcomes = campaign.batch(str(made), kept, range(2))
    assert all(outcome.startswith(words) for _, outcome in outcomes.values())
    assert len(list(kept.iterdir())) == 2
