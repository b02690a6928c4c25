"""torch.compile around a rewired model: what is around its chains is compiled, once, and the numbers stay."""

import copy

import pytest
import timm
import torch

import revwire
from tests.helpers import compiling
from tests.helpers.nets import NETS, assert_same, gradients, loss
from tests.helpers.pictures import vit
from tests.helpers.steps import kept

# torch's own, from inside of dynamo
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def counter():
    yield compiling.fresh()
    compiling.fresh()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["loop", "vit", "convolutions"])
def test_the_numbers_are_those_of_the_recurrence(counter, name, training):
    x = NETS[name].input()
    model = revwire.rewire(NETS[name].build(dropout=0.2 if training else 0.0), x).train(training)
    plain = kept(model)
    compiled = torch.compile(model, backend=counter)
    found = []
    for m in (plain, compiled):
        torch.manual_seed(0)
        out = m(x)
        loss(out).backward()
        found.append([out, *gradients(m)])
    assert_same(*found)


def test_compilations_do_not_grow_with_blocks_or_steps(counter):
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    counts = []
    for depth in (2, 6):
        compiling.fresh()
        model = torch.compile(revwire.rewire(vit(depth=depth), x), backend=counter)
        for _ in range(3):
            model(x).square().sum().backward()
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[1]


def test_both_compilers_at_once(counter, monkeypatch):
    """`rewire(compile=True)` for the branches, torch.compile for the rest: again not one compilation more a block."""
    monkeypatch.setattr(torch, "compile", compiling.counted)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    counts = []
    for depth in (3, 6):
        compiling.fresh()
        model = revwire.rewire(vit(dropout=0.0, depth=depth), x, compile=True)
        plain = kept(model)
        whole = compiling.compile_with(model, backend=counter)
        for m in (plain, whole):
            for _ in range(2):
                loss(m(x)).backward()
        assert_same(gradients(plain), gradients(whole))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 1


def test_a_compiled_model_is_an_unwired_one_s_twin(counter):
    """`unwire` reaches what torch.compile wraps: the wrapper then runs the original."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = vit(dropout=0.0)
    original = copy.deepcopy(model)
    compiled = torch.compile(revwire.rewire(model, x), backend=counter)
    assert not torch.allclose(compiled(x), original(x))
    revwire.unwire(model)
    assert_same([original(x)], [compiled(x)])


def test_a_pyramid_with_compiled_code_between_its_chains(counter):
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", depths=(2, 2, 2, 2), dims=(8, 8, 8, 8), num_classes=5).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = kept(revwire.rewire(model, x))
    compiled = torch.compile(model, backend=counter)
    for m in (plain, compiled):
        loss(m(x)).backward()
    assert_same(gradients(plain), gradients(compiled))
    assert counter.frame_count > 1
