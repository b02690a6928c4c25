"""The benchmark of peers, with none of them installed: errors as rows, packages made up here, gradients, files."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.shared.peer_networks import WAYS, Momentum, Residual, Stack, Way
from benchmarks.shared.step_measurement import failure_of
from revwire.errors import RevwireError
from tests.helpers.commands import command_of, in_one_line, printed
from tests.helpers.programs import ROOT

TINY = {"branches": 4, "dim": 8, "heads": 2, "batch": 2, "tokens": 5}
PACKAGES = {"memcnn": "memcnn", "RevTorch": "revtorch", "revlib": "revlib", "momentumnet": "momentumnet"}


@pytest.fixture(autouse=True)
def _no_peers(monkeypatch):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)


def by_name(rows):
    return {row.strategy: row for row in rows}


def measured(ways, **settings):
    rows, found = peers.compare(peers.stack_case(**TINY, **settings), ways, rounds=1)
    return by_name(rows), found


class Joined(nn.Module):
    """RevNet blocks over one tensor, as the packages have them, under plain autograd."""

    def __init__(self, branches, split_dim):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.split_dim = split_dim

    def forward(self, x):
        one, other = x.chunk(2, self.split_dim)
        for branch in self.branches:
            one, other = other, one + branch(other)
        return torch.cat([one, other], self.split_dim)


def pretend(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def fake_memcnn(monkeypatch):
    pretend(
        monkeypatch,
        "memcnn",
        AdditiveCoupling=lambda split_dim, **branches: Joined(branches.values(), split_dim),
        InvertibleModuleWrapper=lambda fn, keep_input, keep_input_inverse: fn,
    )


def fake_revtorch(monkeypatch):
    pretend(monkeypatch, "revtorch")
    pretend(
        monkeypatch,
        "revtorch.revtorch",
        ReversibleBlock=lambda f, g, split_along_dim: Joined([f, g], split_along_dim),
        ReversibleSequence=lambda blocks: nn.Sequential(*blocks),
    )


def fake_revlib(monkeypatch):
    pretend(
        monkeypatch, "revlib", ReversibleSequential=lambda *branches, split_dim: Joined(branches, split_dim)
    )


def fake_momentumnet(monkeypatch):
    pretend(
        monkeypatch, "momentumnet", MomentumNet=lambda functions, gamma, use_backprop: Momentum(functions)
    )


FAKES = {
    "memcnn": fake_memcnn,
    "RevTorch": fake_revtorch,
    "revlib": fake_revlib,
    "momentumnet": fake_momentumnet,
}


@pytest.mark.slow
def test_a_missing_peer_is_a_row_with_its_error():
    rows, found = measured(WAYS)
    assert list(rows) == list(WAYS)
    for name, package in PACKAGES.items():
        assert rows[name].failure.startswith("ModuleNotFoundError: ")
        assert package in rows[name].failure
        assert rows[name].memory is rows[name].timing is None
    assert list(found) == ["plain", "checkpoint", "revwire"]
    assert found["plain"].gradient == found["checkpoint"].gradient == 0
    assert found["revwire"].gradient < 1e-5
    held = {name: rows[name].memory.held for name in found}
    assert held["revwire"] < held["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAKES)
def test_a_peer_that_computes_the_recurrence_is_measured(name, monkeypatch):
    FAKES[name](monkeypatch)
    rows, found = measured({"plain": WAYS["plain"], name: WAYS[name]}, dtype=peers.Dtype.float64)
    assert not rows[name].failure
    assert rows[name].memory.held
    assert len(rows[name].timing.seconds) == 1
    assert found[name].output < 1e-12
    assert found[name].gradient < 1e-12


class Halved(Stack):
    """All branches but the first get no gradient."""

    def forward(self, x):
        with torch.no_grad():
            rest = Stack(self.branches[1:])(x)
        return x + self.branches[0](x) + rest


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AttributeError("torch has no such thing any more\nsecond line")


class Outdated(Stack):
    def forward(self, x):
        return Raising.apply(super().forward(x))


@pytest.mark.slow
def test_a_peer_that_raises_in_backward_is_a_row_with_its_error():
    rows, found = measured({"plain": WAYS["plain"], "old": Way(lambda stack: Outdated(stack.branches))})
    assert rows["old"].failure == "AttributeError: torch has no such thing any more"
    assert list(found) == ["plain"]


@pytest.mark.slow
def test_missing_gradients_are_seen():
    _, found = measured({"halved": Way(lambda stack: Halved(stack.branches))})
    assert found["halved"].gradient > 0.1


class Shifted(Stack):
    """Of its output, every entry is too large by the same; its gradients are twice what they should be."""

    def forward(self, x):
        return 2 * super().forward(x) - super().forward(x).detach() + 0.5


def test_distances_against_a_hand_computation():
    case = peers.stack_case(**TINY, dtype=peers.Dtype.float64)
    output = case.factory()(case.inputs).detach()
    off = peers.off(case, Way(lambda stack: Shifted(stack.branches)))
    assert off.output == pytest.approx(0.5 * output.numel() ** 0.5 / float(output.norm()))
    assert off.gradient == pytest.approx(1)


@pytest.mark.slow
def test_another_recurrence_is_not_mistaken_for_the_same():
    _, found = measured({"residual": Way(lambda stack: Residual(stack.branches))})
    assert found["residual"].output > 1e-2


def test_plain_is_the_two_stream_form():
    case = peers.stack_case(**TINY, dtype=peers.Dtype.float64)
    stack, x = case.factory(), case.inputs
    one = other = x
    for f, g in zip(stack.branches[::2], stack.branches[1::2], strict=True):
        one = one + f(other)
        other = other + g(one)
    assert torch.equal(stack(x), (one + other) * 0.5)


def test_failures_say_what_was_raised():
    assert failure_of(RevwireError("two\nlines")) == "two\nlines"
    assert failure_of(ValueError("two\nlines")) == "ValueError: two"
    assert failure_of(KeyError()) == "KeyError"


def test_the_table_to_the_character():
    off = {"plain": peers.Off(0.0, 0.0), "peer [x]": peers.Off(2e-7, 3.14e-5)}
    assert printed(peers.off_table(off)) == [
        "off from plain autograd",
        " strategy gradient  output",
        " ─────────────────────────",
        " plain     0.0e+00 0.0e+00",
        " peer [x]  3.1e-05 2.0e-07",
    ]


@pytest.fixture
def command(tmp_path):
    return command_of(peers.main, "--out", tmp_path)


@pytest.mark.slow
def test_the_program_prints_and_writes(command, tmp_path, monkeypatch):
    fake_revlib(monkeypatch)
    chosen = ["plain", "memcnn", "revlib", "revwire"]
    options = [f"--{name}={value}" for name, value in (TINY | {"rounds": 1}).items()]
    result = command(*options, *(f"--way={name}" for name in chosen))
    assert result.exit_code == 0, result.output
    assert "memcnn: ModuleNotFoundError" in result.output
    assert (tmp_path / "peers-cpu-float32.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "peers-cpu-float32.json").read_text()
    read = json.loads(text)
    assert json.dumps(read, indent=1) + "\n" == text
    assert read["cases"][0]["dim"] == 8
    assert set(PACKAGES) < set(read["versions"])
    rows = {row["strategy"]: row for row in read["rows"]}
    assert list(rows) == chosen
    assert set(rows["memcnn"]) == {"case", "strategy", "failure"}
    assert rows["revlib"]["gradient_off"] < 1e-5
    assert {"held", "peak", "seconds"} == set(rows["revwire"]["ratio_to_plain"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--branches", "3"), "3 is odd"),
        (("--dim", "6", "--heads", "4"), "do not divide"),
        (("-w", "magic"), "'magic' is not one of"),
    ],
)
def test_the_program_tells_what_is_wrong_and_exits_2(command, args, message):
    result = command(*args)
    assert result.exit_code == 2
    assert message in in_one_line(result.output)


def test_the_extra_pins_every_package_that_a_way_needs():
    extra = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for way in WAYS.values():
        assert f'"{way.package}==' in extra or not way.package
