"""Plans: what they find, what they say of the rest, how they print and travel, and that planning leaves no trace."""

import copy
import random

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire import Chain, Plan, RewireError, Skipped, Step
from tests.helpers.couplings import Trunk, noise
from tests.helpers.nets import Residual
from tests.helpers.vits import small_vit

words = st.text(st.characters(codec="utf-8"), max_size=12)
steps = st.builds(
    Step,
    module=words,
    residual=st.integers(0, 9),
    trunk=st.lists(st.integers(1, 512), max_size=4).map(tuple),
    branch=st.lists(words, max_size=3).map(tuple),
    sides=st.lists(words, max_size=2).map(tuple),
    post=st.none() | words,
    line=words,
)
chains = st.builds(Chain, st.lists(steps, min_size=1, max_size=3).map(tuple))
plans = st.builds(
    Plan,
    model=words,
    coupling=words,
    chains=st.lists(chains, max_size=3).map(tuple),
    skipped=st.lists(st.builds(Skipped, words, words), max_size=3).map(tuple),
)


@given(plans)
def test_json_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    str(plan)  # whatever the names hold, printing must not trip over markup


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a plan"),
        ("[]", "Input should be an object"),
        ("[" * 100_000, "not a plan: .*recursion"),
        ('{"model": "M", "coupling": "re2tal"}', "chains: Field required"),
        (
            '{"model": "M", "coupling": "re2tal", "chains": [{"steps": [{"moduel": "a"}]}]}',
            r"chains.0.steps.0.module: Field required",
        ),
    ],
)
def test_bad_json_names_the_fault(text, says):
    with pytest.raises(RewireError, match=says):
        Plan.from_json(text)


def test_prints_as_a_table():
    assert str(revwire.plan(small_vit())) == (
        "VisionTransformer: 6 steps in 1 chain, coupling re2tal\n"
        "┏━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━┓\n"
        "┃ chain                ┃ steps ┃ trunk ┃ branch of each step       ┃\n"
        "┡━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━┩\n"
        "│ blocks.0 .. blocks.2 │ 6     │ 5x48  │ norm1 attn ls1 drop_path1 │\n"
        "│                      │       │       │ norm2 mlp ls2 drop_path2  │\n"
        "└──────────────────────┴───────┴───────┴───────────────────────────┘"
    )


def test_planning_leaves_no_trace():
    model = timm.create_model("resnet18").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state, python = torch.get_rng_state(), random.getstate()
    revwire.plan(model)
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()
        assert all(module.__dict__[key] is value for key, value in attributes[name].items())
    assert model.training


def test_hooks_do_not_fire_while_planning():
    model, calls = small_vit(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    revwire.plan(model)
    assert not calls


@pytest.mark.parametrize("name", ["vgg11", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_a_model_without_a_chain_says_so(name):
    model = timm.create_model(name)
    with pytest.raises(RewireError, match="no two residual blocks in a row on one trunk"):
        revwire.rewire(model, torch.zeros(2, 3, 64, 64))
    assert not any(hasattr(type(module), "revwire_original") for module in model.modules())


def block(width=4):
    return Residual(nn.Linear(width, width))


def test_one_step_is_no_chain():
    plan = revwire.plan(nn.Sequential(block(), nn.Linear(4, 8), block(8)), torch.zeros(2, 4))
    assert not plan.chains
    assert [s.module for s in plan.skipped] == ["0", "2"]
    assert all("stands alone" in s.reason and "nets.py:" in s.reason for s in plan.skipped)


def test_inputs_that_are_missing_or_wrong():
    with pytest.raises(RewireError, match="Pass example_inputs"):
        revwire.plan(nn.Sequential(block(), block()))
    with pytest.raises(RewireError, match="does not run on the example inputs"):
        revwire.plan(nn.Sequential(block(), block()), torch.zeros(2, 5))
    with pytest.raises(RewireError, match="a tensor, a tuple or a dict"):
        revwire.plan(nn.Sequential(block(), block()), 3)
    with pytest.raises(
        RewireError, match="unknown coupling 'retal'; known: re2tal, dr2net, momentum, bdia, coupling"
    ):
        revwire.plan(small_vit(), coupling="retal")


def test_inputs_as_tuple_and_dict():
    model, x = nn.Sequential(block(), block()), torch.zeros(2, 4)
    wanted = revwire.plan(model, x)
    assert revwire.plan(model, (x,)) == revwire.plan(model, {"input": x}) == wanted
    assert len(wanted.chains[0].steps) == 2


def test_include_and_exclude():
    model = nn.Sequential(*[block() for _ in range(6)])
    x = torch.zeros(2, 4)
    plan = revwire.plan(model, x, exclude="2")
    assert [[s.module for s in chain.steps] for chain in plan.chains] == [["0", "1"], ["3", "4", "5"]]
    assert plan.skipped == (Skipped("2", "excluded by '2'"),)
    plan = revwire.plan(model, x, include=["0", "1"])
    assert [[s.module for s in chain.steps] for chain in plan.chains] == [["0", "1"]]


def test_rewiring_twice_is_refused_and_unwiring_what_is_not_rewired_too():
    model = small_vit()
    with pytest.raises(RewireError, match="not rewired"):
        revwire.unwire(model)
    revwire.rewire(model)
    with pytest.raises(RewireError, match=r"rewired already; call revwire\.unwire"):
        revwire.rewire(model)
    with pytest.raises(RewireError, match="rewired already"):
        revwire.plan(model)


def test_a_plan_can_be_given():
    x = torch.zeros(2, 3, 32, 32)
    plan = revwire.plan(small_vit(), exclude="blocks.0")
    model = revwire.rewire(small_vit(), x, plan=Plan.from_json(plan.to_json()))
    assert revwire.plan_of(model) == plan
    shallow = small_vit(depth=2)
    with pytest.raises(RewireError, match=r"has no residual blocks\.2#0"):
        revwire.rewire(shallow, plan=plan)
    assert revwire.plan_of(shallow) is None


def test_a_residual_inside_anothers_branch_is_left_alone():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(block(), block())

        def forward(self, x):
            return x + self.inner(x).tanh()

    plan = revwire.plan(nn.Sequential(Nested(), Nested()), torch.zeros(2, 4))
    assert [s.module for chain in plan.chains for s in chain.steps] == ["0", "1"]
    assert {s.module for s in plan.skipped} == {"0.inner.0", "0.inner.1", "1.inner.0", "1.inner.1"}
    assert all("inside the branch" in s.reason for s in plan.skipped)
    lone = revwire.plan(Nested(), torch.zeros(2, 4))
    assert [s.module for chain in lone.chains for s in chain.steps] == ["inner.0", "inner.1"]


def test_same_class_keys_and_tensors_and_exactly_back():
    model, x = small_vit(), torch.randn(2, 3, 32, 32)
    cls, classes = type(model), [type(m) for m in model.modules()]
    before, out = dict(model.state_dict(keep_vars=True)), model(x)
    assert revwire.rewire(model) is model
    assert isinstance(model, cls)
    assert repr(type(model)) == repr(cls)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is tensor for key, tensor in before.items())
    assert not torch.equal(model(x), out)
    assert revwire.unwire(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), out)
    assert revwire.plan_of(model) is None


class CachesItsBias(nn.Module):
    """Attention as LeViT has it: in eval mode its bias is computed once and kept in a dict."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
        self.cache, self.calls = {}, []

    def forward(self, x):
        self.calls.append(x.shape)
        if self.training:
            return self.body(x) + self.table * 2
        if "bias" not in self.cache:
            self.cache["bias"] = self.table * 2
        return self.body(x) + self.cache["bias"]


def test_planning_leaves_caches_inside_of_modules_alone():
    model, x = nn.Sequential(*(Residual(CachesItsBias()) for _ in range(2))), torch.randn(2, 8)
    wanted = copy.deepcopy(model).eval()(x)
    assert len(revwire.plan(model, x).chains[0].steps) == 2
    assert not model[0].body[0].cache
    assert not model[0].body[0].calls
    report = revwire.verify(model, x)
    assert report.ok, report.to_dict()
    torch.testing.assert_close(model.eval()(x), wanted)


def test_a_plan_warns_where_float32_would_not_carry_the_gradients():
    x, deep = noise(), Trunk(24)
    (told,) = revwire.plan(deep, x, coupling="bdia").warnings
    assert "amplifies rounding errors 2 times a step; over 24 steps" in told
    assert "at most 14 steps" in told
    assert told in str(revwire.plan(deep, x, coupling="bdia")).replace("\n", " ")
    assert revwire.Plan.from_json(revwire.plan(deep, x, coupling="bdia").to_json()).warnings == (told,)
    assert not revwire.plan(deep, x, coupling="bdia", exact=True).warnings
    assert not revwire.plan(Trunk(12), x, coupling="bdia").warnings
    with pytest.warns(UserWarning, match="24 steps gradients of float32 streams would be wrong"):
        revwire.rewire(deep, x, coupling="bdia")
    with pytest.warns(UserWarning, match="not reversible, so it saves no memory"):
        revwire.rewire(Trunk(3), x, coupling=revwire.Momentum(0))


def test_a_plan_brings_its_grid_and_coupling_and_refuses_others():
    x = noise()
    plan = revwire.plan(Trunk(2), x, coupling="bdia", exact=True)
    assert revwire.plan_of(revwire.rewire(Trunk(2), x, plan=plan)) == plan
    for other in (False, 1):
        with pytest.raises(RewireError, match="pass exact=True"):
            revwire.rewire(Trunk(2), x, plan=plan, exact=other)
    with pytest.raises(RewireError, match="pass coupling='bdia"):
        revwire.rewire(Trunk(2), x, plan=plan, coupling="re2tal")
    assert revwire.Plan.from_json(plan.to_json()) == plan


def test_a_plan_prints_coefficients_and_exactness():
    told = " ".join(str(revwire.plan(Trunk(2), noise(), coupling="bdia", exact=True)).split())
    assert "2 steps in 1 chain, coupling bdia(gamma=0.5), exact" in told
