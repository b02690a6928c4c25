"""What is planned trains too: plans are made in both modes, and what is another step in training is left alone in both.

The references are the recurrence written out over the sub-modules of the net, in float64, in the mode it runs in.
"""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import revwire
from revwire.errors import RewireError
from revwire.measure import measure_step
from revwire.rewrite.wired import options_of, with_options
from revwire.run.options import Options
from tests.helpers.nets import assert_same, recur

WIDTH = 6


def body():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Block(nn.Module):
    """`x + f(x)`; what it does beside that is up to `after` and `skips`."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = body(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self, make=Block, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def inputs():
    return torch.randn(5, WIDTH, dtype=torch.float64)


def net(make=Block, depth=4):
    return Net(make, depth).double()


def steps_of(model, x=None):
    return [len(chain.steps) for chain in revwire.plan(model, inputs() if x is None else x).chains]


def reasons_of(model, x=None):
    return [s.reason for s in revwire.plan(model, inputs() if x is None else x).skipped]


def assert_gradients_as_kept(model, x, seed=1):
    """Memory-free gradients in train mode are those of plain autograd through the same recurrence."""
    found = []
    for replay in (True, False):
        copy = with_options(model, Options(options_of(model).coupling, replay)).train()
        torch.manual_seed(seed)
        copy(x).square().sum().backward()
        found.append([p.grad for p in copy.parameters() if p.grad is not None])
    assert_same(*found)


def isfinite_all(x):
    return not torch.isfinite(x).all()


def isnan_any(x):
    return torch.isnan(x).any() or torch.isinf(x).any()


def joined(x):
    return (torch.isinf(x) | torch.isnan(x)).any()


def method(x):
    return not x.isfinite().all()


@pytest.mark.parametrize("broken", [isfinite_all, isnan_any, joined, method])
@pytest.mark.parametrize("inside", [False, True])
def test_a_check_of_numbers_in_training_is_no_reason_not_to_train(broken, inside):
    """DETR's encoder layers look for infs in training alone."""

    class Checked(Block):
        def forward(self, x):
            h = self.body(x)
            if inside and self.training and broken(h):
                h = h.clamp(-1, 1)
            x = x + h
            if not inside and self.training and broken(x):
                x = x.clamp(-1, 1)
            return x

    x, model = inputs(), net(Checked)
    wanted = recur(x, [block.body for block in model.blocks])
    revwire.rewire(model, x)
    for training in (False, True):
        assert_same([model.train(training)(x)], [wanted])
    assert_gradients_as_kept(model, x)
    with pytest.raises(RewireError, match=r"the check at test_training_modes.py:\d+ found numbers"):
        model(x / 0)
    model.eval()(x / 0)


def test_a_check_of_numbers_keeps_no_memory():
    class Checked(Block):
        def forward(self, x):
            x = x + self.body(x)
            if self.training and not torch.isfinite(x).all():
                x = x.clamp(-1, 1)
            return x

    x = torch.randn(64, WIDTH, dtype=torch.float64)
    held = []
    for depth in (4, 8):
        model = revwire.rewire(net(Checked, depth), x, check=False).train()
        model(x)
        held.append(measure_step(model, x).held)
    assert held[1] == held[0]


def test_other_decisions_by_numbers_are_no_checks():
    class Decides(Block):
        def forward(self, x):
            if self.training and (torch.isfinite(x) & (x > 9)).all():
                return x
            return x + self.body(x)

    reasons = reasons_of(net(Decides))
    assert len(reasons) == 4
    assert all("in training its forward decides by the numbers" in reason for reason in reasons)


def test_functional_dropout_after_the_sum_moves_in():
    class Dropped(Block):
        def forward(self, x):
            return functional.dropout(self.norm(x + self.body(x)), 0.5, self.training)

    def reference(block, training):
        return lambda x: functional.dropout(block.norm(block.body(x)), 0.5, training)

    x, model = inputs(), net(Dropped)
    wanted = []
    for training in (False, True):
        torch.manual_seed(3)
        wanted.append(recur(x, [reference(block, training) for block in model.blocks]))
    assert steps_of(model) == [4]
    revwire.rewire(model, x)
    for training in (False, True):
        torch.manual_seed(3)
        assert_same([model.train(training)(x)], [wanted[training]])
    assert_gradients_as_kept(model, x)


def test_the_train_mode_code_is_there_when_the_model_is_rewired():
    """No call has to be traced: a second recording at run time would be another proof."""

    class Dropped(Block):
        def forward(self, x):
            return x + functional.dropout(self.body(x), 0.5, self.training)

    x = inputs()
    model = revwire.rewire(net(Dropped), x)
    variants = [list(block.__dict__["_revwire_program"]._variants) for block in model.blocks]
    model.train()(x)
    model.eval()(x)
    assert [block.__dict__["_revwire_program"]._variants for block in model.blocks] == variants


def drawn_by_torch():
    return torch.rand(1) < 1e-9


def drawn_by_python():
    return random.random() < 1e-9


def drawn_by_numpy():
    return np.random.rand() < 1e-9  # noqa: NPY002 - what models do


@pytest.mark.parametrize("drawn", [drawn_by_torch, drawn_by_python, drawn_by_numpy])
def test_a_block_that_skips_itself_at_random_is_refused(drawn):
    class Skips(Block):
        def forward(self, x):
            if self.training and drawn():
                return x
            return x + self.body(x)

    reasons = reasons_of(net(Skips))
    assert len(reasons) == 4
    for reason in reasons:
        assert "in training its forward d" in reason
        assert "test_training_modes.py:" in reason
        assert "layerdrop=0" in reason
    with pytest.raises(RewireError, match="in training"):
        revwire.rewire(net(Skips), inputs())
    # a block that does it among others that do not parts them, in both modes
    mixed = net()
    mixed.blocks.insert(2, Skips().double())
    assert steps_of(mixed) == [2, 2]
    x = inputs()
    wanted = recur(
        mixed.blocks[2](recur(x, [b.body for b in mixed.blocks[:2]])), [b.body for b in mixed.blocks[3:]]
    )
    revwire.rewire(mixed, x)
    for training in (False, True):
        assert_same([mixed.train(training)(x)], [wanted])


def test_layers_that_the_loop_skips_at_random_stay_one_chain():
    class Dropping(Net):
        rate = 0.5

        def forward(self, x):
            for block in self.blocks:
                skipped = self.training and torch.rand([]) < self.rate
                if not skipped:
                    x = block(x)
            return x

    x, model = inputs(), Dropping(depth=8).double()
    for seed in range(3):
        torch.manual_seed(seed)  # planning may meet any of them
        assert steps_of(model, x) == [8]
    wanted = recur(x, [block.body for block in model.blocks])
    revwire.rewire(model, x)
    model.rate = 0.0
    for training in (False, True):
        assert_same([model.train(training)(x)], [wanted])
    model.rate = 0.5
    assert_gradients_as_kept(model, x)


@pytest.mark.parametrize("layerdrop", [0.0, 0.1, 1e-9])
def test_wav2vec2_is_one_function_in_both_modes(layerdrop):
    transformers = pytest.importorskip("transformers")
    names = ("hidden", "attention", "activation", "feat_proj")
    rates = {f"{name}_dropout": 0.0 for name in names} | {"mask_time_prob": 0.0}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8)}
    embedding = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": layerdrop}
    model = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**sizes, **convolutions, **embedding, **rates)
    )
    wave = torch.randn(2, 400)
    plan = revwire.plan(model, {"input_values": wave})
    assert [len(chain.steps) for chain in plan.chains] == [7 if layerdrop == 0.0 else 6]
    if layerdrop:
        assert any(
            "in training its forward decides" in s.reason for s in plan.skipped if s.module == "encoder"
        )
    revwire.rewire(model, {"input_values": wave})
    model.config.layerdrop = min(layerdrop, 1e-9)
    with torch.no_grad():
        evaluated, trained = model.eval()(wave)[0], model.train()(wave)[0]
    torch.testing.assert_close(trained, evaluated)


def test_another_sum_in_training_is_another_step():
    class Other(Block):
        def forward(self, x):
            if self.training:
                return self.norm(x) + self.body(x)
            return x + self.body(x)

    reasons = reasons_of(net(Other))
    assert len(reasons) == 4
    assert all(r.startswith("in training the residual at test_training_modes.py") for r in reasons)


def test_another_branch_in_training_is_another_step():
    class Other(Block):
        def forward(self, x):
            h = self.norm(x) if self.training else self.body(x)
            return x + h

    reasons = reasons_of(net(Other))
    assert len(reasons) == 4
    assert all("calls norm, not body" in reason for reason in reasons)


def test_a_drop_module_in_training_alone_is_no_other_step():
    class Dropping(Block):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = self.body(x)
            return x + (self.drop(h) if self.training else h)

    model = revwire.rewire(net(Dropping), inputs())
    assert steps_of(net(Dropping)) == [4]
    assert_gradients_as_kept(model, inputs())


def test_another_operation_after_the_sum_is_another_step():
    class Other(Block):
        def forward(self, x):
            x = x + self.body(x)
            return torch.sin(x) if self.training else torch.relu(x)

    reasons = reasons_of(net(Other))
    assert len(reasons) == 4
    assert all("has no relu after the sum" in reason for reason in reasons)


def test_the_same_sum_at_another_line_is_another_step():
    class Other(Block):
        def forward(self, x):
            if self.training:
                return x + self.body(x).sin()
            return x + self.body(x)

    reasons = reasons_of(net(Other))
    assert len(reasons) == 4
    assert all("is not there: it adds at test_training_modes.py" in reason for reason in reasons)


def test_a_branch_that_cannot_run_as_one_in_training_is_refused():
    class Draws(Block):
        def forward(self, x):
            h = self.body(x)
            if self.training:
                h = functional.dropout(h, 0.1)
                torch.rand(3)  # of other code
                h = functional.dropout(h, 0.1)
            return x + h

    reasons = reasons_of(net(Draws))
    assert len(reasons) == 4
    assert all("draws random numbers in turns" in reason and "in training" in reason for reason in reasons)


def test_another_number_of_side_inputs_is_another_step():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.more = body(), body()

        def forward(self, x, y):
            h = x * y if self.training else x
            return x + self.body(h)

    class Around(Net):
        def forward(self, x):
            y = x.sigmoid()
            for block in self.blocks:
                x = block(x, y)
            return x

    reasons = reasons_of(Around(Other).double())
    assert len(reasons) == 4
    assert all("reads other values" in reason for reason in reasons)


def test_what_changes_the_trunk_in_training_parts_the_chain_in_both_modes():
    class Noisy(Net):
        rate = 0.0

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                if self.training and i == 2:
                    x = x + self.rate * torch.randn_like(x)
                x = block(x)
            return x

    x, model = inputs(), Noisy().double()
    assert steps_of(model) == [2, 2]
    bodies = [block.body for block in model.blocks]
    wanted = recur(recur(x, bodies[:2]), bodies[2:])
    revwire.rewire(model, x)
    for training in (False, True):
        assert_same([model.train(training)(x)], [wanted])


def test_a_lone_block_beside_it_says_what_parts_it():
    class Noisy(Net):
        def forward(self, x):
            for i, block in enumerate(self.blocks):
                if self.training and i == 1:
                    x = x + 0.1
                x = block(x)
            return x

    (reason,) = reasons_of(Noisy(depth=3).double())
    assert reason.startswith("in training the code between test_training_modes.py:")


def test_a_trunk_that_modules_only_rearrange_goes_on_in_training():
    """Those that are alike run once in the train-mode recording: not such, whose output is their input."""

    class Turned(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1).contiguous()

    class Turning(Net):
        def __init__(self):
            super().__init__(depth=6)
            self.there, self.back = (
                nn.ModuleList(Turned() for _ in range(6)),
                nn.ModuleList(Turned() for _ in range(6)),
            )

        def forward(self, x):
            for there, back, block in zip(self.there, self.back, self.blocks, strict=True):
                x = block(back(there(x)))
            return x

    assert steps_of(Turning().double()) == [6]


def test_a_model_that_wants_targets_in_training_is_planned_by_its_blocks():
    class Detector(Net):
        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets should not be none when in training mode")
            return super().forward(x)

    class Skips(Block):
        def forward(self, x):
            if self.training and torch.rand(1) < 1e-9:
                return x
            return x + self.body(x)

    assert steps_of(Detector().double()) == [4]
    assert not steps_of(Detector(Skips).double())


def test_one_value_a_channel_is_no_reason_against_training():
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    assert steps_of(net(Normed), torch.randn(1, WIDTH, 1, 1, dtype=torch.float64)) == [4]


class Varlen(nn.Module):
    """Qwen2-VL's attention splits by lengths that it takes out of a tensor."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, lengths):
        return torch.cat([self.proj(part).tanh() for part in x.split(lengths.tolist())])


class Splitting(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Varlen()
        self.gain = 1.0

    def forward(self, x, lengths):
        return x + functional.dropout(self.gain * self.attn(x, lengths), 0.1, self.training)


class Packed(Net):
    def forward(self, x, lengths):
        for block in self.blocks:
            x = block(x, lengths)
        return x


def test_what_needs_numbers_is_planned_and_traced_again_on_a_real_run():
    x, lengths = inputs(), torch.tensor([2, 3])
    model = revwire.rewire(Packed(Splitting).double(), (x, lengths))

    def reference(gain):
        return recur(x, [lambda v, b=b: gain * b.attn(v, lengths) for b in model.blocks])

    wanted = reference(1.0)
    assert_same([model.eval()(x, lengths)], [wanted])
    for block in model.blocks:
        block.gain = 2.0  # another way of calling, which no plan has seen
    state = torch.get_rng_state()
    assert_same([model(x, lengths)], [reference(2.0)])
    assert torch.equal(torch.get_rng_state(), state)
    model.train()(x, lengths)


def test_numbers_read_out_of_a_tensor_are_no_constants():
    class Decides(Splitting):
        def forward(self, x, lengths):
            if self.gain > 1 and lengths[0].item() > 2:
                return x
            return x + self.attn(x, lengths)

    x = inputs()
    model = revwire.rewire(Packed(Decides).double(), (x, torch.tensor([2, 3])))
    for block in model.blocks:
        block.gain = 2.0
    with pytest.raises(RewireError, match="decides by what an object returned"):
        model(x, torch.tensor([2, 3]))


def test_planning_in_train_mode_leaves_no_trace():
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
            self.seen = 0

        def forward(self, x):
            return x + self.body(x)

    model = net(Normed)
    model.blocks[1].eval()
    x = inputs()
    modes = [module.training for module in model.modules()]
    state, seeds = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert steps_of(model, x) == [4]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), seeds)
    assert_same(list(model.state_dict().values()), list(state.values()))


class Inverted(Block):
    def forward(self, x, adaptive=False):
        if adaptive and x.sum() > 0:
            return x
        return x + self.body(x)


class Asking(Net):
    def forward(self, x, adaptive=False):
        for block in self.blocks:
            x = block(x, adaptive)
        return x


def test_a_call_that_cannot_be_rewired_is_an_error():
    model = revwire.rewire(Asking(Inverted).double(), inputs())
    for _ in range(2):
        with pytest.raises(
            RewireError, match=r'Inverted.*decides by the numbers in a tensor.*fallback="original"'
        ):
            model(inputs(), adaptive=True)
    model(inputs())


def test_the_original_forward_runs_for_who_asks_for_it():
    x, model = inputs(), Asking(Inverted).double()
    wanted = model(x, adaptive=True)
    revwire.rewire(model, x, fallback="original")
    with pytest.warns(UserWarning, match="runs the original forward") as told:
        assert_same([model(x, adaptive=True)], [wanted])
    assert len(told) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, adaptive=True)  # told once


def test_what_fallback_may_be():
    with pytest.raises(RewireError, match="fallback is one of error, original, not 'warn'"):
        revwire.rewire(net(), inputs(), fallback="warn")
    rows = revwire.estimate(net(), inputs(), strategies={"own": {"fallback": "original"}}).rows
    assert [row.failure for row in rows] == [""]


def test_a_plan_from_elsewhere_is_proven_in_training_too():
    class Skips(Block):
        def forward(self, x):
            if self.training and torch.rand(1) < 1e-9:
                return x
            return x + self.body(x)

    class Noisy(Net):
        def forward(self, x):
            for block in self.blocks:
                x = block(x + 0.1 if self.training else x)
            return x

    plan = revwire.plan(net(), inputs())
    with pytest.raises(RewireError, match=r"the plan does not fit Net: blocks\.0#0: in training"):
        revwire.rewire(net(Skips), inputs(), plan=plan)
    with pytest.raises(RewireError, match="the plan does not fit Noisy: in training the code between"):
        revwire.rewire(Noisy().double(), inputs(), plan=plan)


@pytest.mark.parametrize("transitions", ["keep", "checkpoint"])
def test_a_chain_never_goes_on_into_another_one(transitions):
    """In training nothing is between them; the pair that the first hands on is merged all the same."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Net(depth=3), Net(depth=3)
            self.between = nn.LayerNorm(WIDTH)

        def forward(self, x):
            x = self.first(x)
            if not self.training:
                x = self.between(x)
            return self.second(x)

    x, model = inputs(), Two().double()
    branches = [[block.body for block in part.blocks] for part in (model.first, model.second)]
    wanted = {
        False: recur(model.between(recur(x, branches[0])), branches[1]),
        True: recur(recur(x, branches[0]), branches[1]),
    }
    plan = revwire.plan(model, x, transitions=transitions)
    assert [chain.open for chain in plan.chains] == [transitions == "checkpoint", False]
    revwire.rewire(model, x, plan=plan)
    for training in (False, True):
        assert_same([model.train(training)(x)], [wanted[training]])
    assert_gradients_as_kept(model, x)


def test_a_block_of_a_sequence_that_changes_its_shape_in_training_is_none():
    """For couplings that take whole blocks: tokens dropped in training alone leave no `G(x) - x`."""

    class Halves(nn.Module):
        def forward(self, x):
            return x[:, ::2] if self.training else x * 1.0

    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    layers = [nn.Linear(WIDTH, WIDTH), Halves(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    (chain,) = revwire.plan(nn.Sequential(*layers).double(), x, coupling="momentum").chains
    assert [step.branch for step in chain.steps] == [("2",), ("3",)]
    del layers[1]
    assert [
        len(c.steps) for c in revwire.plan(nn.Sequential(*layers).double(), x, coupling="momentum").chains
    ] == [3]
