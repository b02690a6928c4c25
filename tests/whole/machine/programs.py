"""The machine: a random net, and a random program of forwards, backwards and changes, run on two rewired copies.

One copy keeps the graphs of all branches (`keep="*"`), which is ordinary autograd; the other keeps nothing. The rule:
outputs, gradients, buffers and random states are the same, or revwire said that it cannot.
"""

import copy
import random
import threading
import warnings
from collections import Counter

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.utils.checkpoint import CheckpointError, checkpoint

import revwire
from tests.whole.machine.nets import BLOCKS, FEATURES, TOKENS, WIDTH, Net, Object

TRIED = Counter()
"""What the machine has done so far: programs, operations, gradients compared, refusals."""

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "coupling": st.sampled_from(["bdia", "momentum(gamma=0.5)", "dr2net(alpha=0.5,beta=0.7)"]),
        "exact": st.booleans(),
        "anchor": st.sampled_from(["*", "stages.0.0*", "stages.0.1*"]),
        "transitions": st.just("checkpoint"),
    },
)
CLOSE = 1e-6


def in_thread(work):
    done = []

    def run():
        try:
            done.append((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised by who waits
            done.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = done[0]
    if error is not None:
        raise error
    return result


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def random_states():
    return torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum()  # noqa: NPY002


class Programs(RuleBasedStateMachine):
    """Rules run on the copy that keeps everything first; `self.over` is set where revwire refuses to go on."""

    def __init__(self):
        super().__init__()
        self.over, self.pending, self.hooks, self.at = True, [], [], 0

    @initialize(
        blocks=st.lists(
            st.tuples(st.sampled_from(BLOCKS), st.sampled_from(FEATURES), st.sampled_from(FEATURES)),
            min_size=2,
            max_size=5,
        ),
        staged=st.booleans(),
        taps=st.booleans(),
        options=OPTIONS,
        batch=st.integers(2, 4),
    )
    def net(self, blocks, staged, taps, options, batch):
        seed(0)
        TRIED["programs"] += 1
        original = Net([kind(*features) for kind, *features in blocks], staged=staged, taps=taps).double()
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)
        try:
            self.models = [
                revwire.rewire(copy.deepcopy(original), x, **{**options, **more})
                for more in ({"keep": "*"}, {})
            ]
        except revwire.RewireError:
            TRIED["nets that cannot be rewired"] += 1
            return
        self.over = False

    @precondition(lambda self: self.over)
    @rule()
    def nothing_more(self):
        """revwire said that it cannot."""

    @property
    def lends(self):
        return any(getattr(module, "lends", False) for module in self.models[0].modules())

    def both(self, work):
        """What `work(i, model)` returns for both copies, from the same random states."""
        TRIED["operations"] += 1
        self.at += 1
        results, states = [], []
        for i, model in enumerate(self.models):
            seed(self.at)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results.append(work(i, model))
            except revwire.RevwireError:
                TRIED["programs that ended with an error of revwire's"] += 1
                self.over = True
                return None
            except RuntimeError as error:
                changed = "modified by an inplace operation" in str(error)
                if i == 0 and (changed or isinstance(error, CheckpointError)):
                    TRIED["programs that autograd cannot run"] += 1
                    self.over = True
                    return None
                raise
            states.append(random_states())
        assert str(states[0]) == str(states[1]), "random states"
        self.same_buffers()
        return results

    def same_buffers(self):
        one, other = (dict(model.named_buffers()) for model in self.models)
        for name, buffer in one.items():
            near(name, buffer, other[name])

    def each(self, change):
        """A change of both copies."""
        return self.both(lambda _, model: change(model))

    @precondition(lambda self: not self.over and len(self.pending) < 3)
    @rule(
        batch=st.integers(1, 4),
        how=st.sampled_from(["grad"] * 5 + ["input"] * 2 + ["no grad", "inference"]),
        threaded=st.sampled_from([False] * 4 + [True]),
    )
    def forward(self, batch, how, threaded):
        """A forward whose backward comes later, if at all."""
        seed(1000 + self.at)
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(how == "input") for _ in self.models]

        def run(i, model):
            def call():
                with (
                    torch.set_grad_enabled(how not in {"no grad", "inference"}),
                    torch.inference_mode(how == "inference"),
                ):
                    return model(inputs[i])

            return in_thread(call) if threaded else call()

        if (outputs := self.both(run)) is None:
            return
        near("output", *outputs)
        if outputs[0].requires_grad:
            losses = [out.square().mean() for out in outputs]
            self.pending.append((losses, inputs))

    @precondition(
        lambda self: not self.over and all(getattr(m, "repeats", True) for m in self.models[0].modules())
    )
    @rule(batch=st.integers(1, 4), parts=st.booleans())
    def step_within_a_checkpoint(self, batch, parts):
        """Torch's own checkpoint around the model, or around each stage and block by turns."""
        seed(2000 + self.at)
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)

        def run(_, model):
            if not parts:
                out = checkpoint(model, x, use_reentrant=False)
            else:
                out = model.stem(x)
                for i, stage in enumerate(model.stages):
                    out = model.between(out) if i else out
                    for j, block in enumerate(stage):
                        out = block(out) if (i + j) % 2 else checkpoint(block, out, use_reentrant=False)
                out = model.head(out)
            out.square().mean().backward()
            return out

        if (outputs := self.both(run)) is not None:
            near("output", *outputs)
            self.same_gradients()

    @precondition(lambda self: not self.over and self.pending)
    @rule(data=st.data(), retain=st.booleans(), threaded=st.sampled_from([False] * 4 + [True]))
    def backward(self, data, retain, threaded):
        at = data.draw(st.integers(0, len(self.pending) - 1))
        losses, inputs = self.pending[at] if retain else self.pending.pop(at)

        def run(i, _):
            def call():
                losses[i].backward(retain_graph=retain)

            return in_thread(call) if threaded else call()

        if self.both(run) is not None:
            self.same_gradients(inputs)

    @precondition(lambda self: not self.over)
    @rule(batch=st.integers(1, 4))
    def step(self, batch):
        self.pending, pending = [], self.pending
        self.forward(batch, "grad", threaded=False)
        self.backward_of_all()
        self.pending = pending

    def teardown(self):
        """Every program ends with a step."""
        if not self.over:
            self.forward(2, "grad", threaded=False)
            self.backward_of_all()

    @precondition(lambda self: not self.over and len(self.pending) > 1)
    @rule()
    def backward_of_all(self):
        pending, self.pending = self.pending, []
        if self.over or not pending:
            return
        if self.both(lambda i, _: sum(losses[i] for losses, _ in pending).backward()) is not None:
            self.same_gradients()

    @precondition(lambda self: not self.over and self.pending)
    @rule()
    def gradients_alone(self):
        losses, _ = self.pending.pop()

        def run(i, model):
            wanted = [p for p in model.parameters() if p.requires_grad]
            return torch.autograd.grad(losses[i], wanted, allow_unused=True)

        if (found := self.both(run)) is not None:
            for one, other in zip(*found, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    near("gradient", one, other)
            TRIED["gradients compared"] += 1

    def same_gradients(self, inputs=()):
        one, other = (dict(model.named_parameters()) for model in self.models)
        for name, parameter in one.items():
            assert (parameter.grad is None) == (other[name].grad is None), name
            if parameter.grad is not None:
                near(f"gradient of {name}", parameter.grad, other[name].grad)
        if inputs and inputs[0].grad is not None:
            near("gradient of the input", inputs[0].grad, inputs[1].grad)
        TRIED["gradients compared"] += 1

    @precondition(lambda self: not self.over and not (self.pending and self.lends))
    @rule(data=st.data(), training=st.booleans())
    def mode(self, data, training):
        paths = [path for path, _ in self.models[0].named_modules() if path.count(".") < 4]
        path = data.draw(st.sampled_from(paths) | st.just(""))
        self.each(lambda model: model.get_submodule(path).train(training))

    @precondition(lambda self: not self.over)
    @rule(value=st.sampled_from([0.5, 1.0, 2.0]), of_class=st.booleans())
    def strength(self, value, of_class):
        def change(model):
            for module in model.modules():
                if isinstance(module, Object):
                    module.state.strength = value
                elif hasattr(type(module), "strength"):
                    if of_class:
                        module.__dict__.pop("strength", None)
                    else:
                        module.strength = value

        self.each(change)

    @precondition(lambda self: not self.over)
    @rule(value=st.floats(0.25, 1))
    def mask(self, value):
        def change(model):
            for module in model.modules():
                if hasattr(module, "mask"):
                    module.mask = torch.full((WIDTH,), value, dtype=torch.float64)

        self.each(change)

    @precondition(lambda self: not self.over)
    @rule(on=st.sampled_from([True, True, False]))
    def switch(self, on):
        self.each(lambda model: [setattr(b, "on", on) for stage in model.stages for b in stage])

    @precondition(lambda self: not self.over)
    @rule(block=st.integers(0, 1), child=st.sampled_from(["", ".body", ".body.linear"]), before=st.booleans())
    def hook(self, block, child, before):
        def change(model):
            module = (
                model.get_submodule(f"stages.0.{block}{child}")
                if block < len(model.stages[0])
                else model.head
            )
            if before:
                return module.register_forward_pre_hook(lambda _, given: (given[0] * 1.5,))
            return module.register_forward_hook(lambda _, __, out: out * 0.5)

        if (handles := self.each(change)) is not None:
            self.hooks.append(handles)

    @precondition(lambda self: not self.over and self.hooks)
    @rule()
    def unhook(self):
        handles = self.hooks.pop()
        self.both(lambda i, _: handles[i].remove())

    @precondition(lambda self: not self.over)
    @rule(data=st.data(), trains=st.booleans())
    def freeze(self, data, trains):
        names = [name for name, _ in self.models[0].named_parameters()]
        name = data.draw(st.sampled_from(names))
        self.each(lambda model: model.get_parameter(name).requires_grad_(trains))

    @precondition(lambda self: not self.over)
    @rule()
    def optimizer_step(self):
        def step(model):
            torch.optim.SGD(model.parameters(), lr=1e-2).step()
            model.zero_grad()

        self.each(step)

    @precondition(lambda self: not self.over and not self.pending and not self.hooks)
    @rule()
    def deep_copy(self):
        def clear(model):
            for module in model.modules():
                if hasattr(module, "last"):
                    module.last = None  # torch copies no tensor with a history

        self.each(clear)
        self.models = [copy.deepcopy(model) for model in self.models]

    @precondition(lambda self: not self.over)
    @rule(name=st.sampled_from(["linear", "feature"]))
    def replace_child(self, name):
        def change(model):
            body = model.stages[0][0].body if len(model.stages[0]) else model.stages[1][0].body
            setattr(body, name, copy.deepcopy(body.linear if name == "linear" else FEATURES[0]()))

        self.each(change)


def tried(programs, steps, **options):
    """Run the machine on so many programs, of so many rules at most; raises what it finds."""
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=programs,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def near(what, one, other):
    one, other = one.detach(), other.detach()
    assert one.shape == other.shape, what
    size = max(1.0, float(one.abs().max())) if one.numel() else 1.0
    off = float((one - other).abs().max()) / size if one.numel() else 0.0
    same_nans = torch.equal(one.isnan(), other.isnan())
    assert off <= CLOSE or (same_nans and bool(one.isnan().any())), f"{what}: {off:.1e} apart"
