"""The compatibility checks that torch's own checkpoint and every reversible library fail somewhere in.

Each runs on real timm blocks and on nets written by hand, in float64, against plain autograd through the recurrence
written out here, which shares no code with revwire: streams (x, x), next = previous + F(current), mean at the end.
"""

import copy
import gc
import random
import weakref

import pytest
import timm
import torch
from torch import nn

import revwire
from revwire import ReplayError

WIDTH = 8


class Loop(nn.Module):
    """`x = attn(x) + x; x = ff(x) + x`, as people write it."""

    def __init__(self, dropout=0.0, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(
                        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.Tanh()
                    ),
                    nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x

    def branches(self):
        return [branch for pair in self.layers for branch in pair]


class Convolutional(nn.Module):
    """Post-activation blocks with BatchNorm: `relu(x + F(x))`."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = (
                nn.Conv2d(3, 3, 3, padding=1),
                nn.BatchNorm2d(3),
                nn.ReLU(inplace=True),
            )

        def forward(self, x):
            out = self.bn(self.conv(x))
            out += x
            return self.act(out)

    def __init__(self, dropout=0.0):
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block(), self.Block())

    def forward(self, x):
        return self.blocks(x)

    def branches(self):
        return [lambda x, b=b: torch.relu(b.bn(b.conv(x))) for b in self.blocks]


class TimmBlocks(nn.Module):
    """The blocks of a timm vision transformer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            embed_dim=WIDTH,
            depth=3,
            num_heads=2,
            proj_drop_rate=dropout,
            drop_path_rate=dropout,
        )
        self.blocks = model.blocks
        for block in self.blocks:
            block.attn.fused_attn = False  # the fused kernel has no double backward

    def forward(self, x):
        return self.blocks(x)

    def branches(self):
        found = []
        for block in self.blocks:
            found.append(lambda x, b=block: b.drop_path1(b.ls1(b.attn(b.norm1(x)))))
            found.append(lambda x, b=block: b.drop_path2(b.ls2(b.mlp(b.norm2(x)))))
        return found


SHAPES = {Loop: (4, 5, WIDTH), TimmBlocks: (4, 5, WIDTH), Convolutional: (4, 3, 6, 6)}


class Reference(nn.Module):
    """Plain autograd through the recurrence of a net's unwired copy."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        previous = current = x
        for branch in self.net.branches():
            previous, current = current, previous + branch(current)
        return (previous + current) / 2


@pytest.fixture(params=[Loop, TimmBlocks, Convolutional], ids=lambda cls: cls.__name__)
def kind(request):
    return request.param


def pair(kind, dropout=0.0, seed=0):
    """The reference and the rewired model, with the same non-zero weights, and an input."""
    torch.manual_seed(seed)
    net = kind(dropout).double()
    for parameter in net.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(SHAPES[kind], dtype=torch.float64)
    return Reference(copy.deepcopy(net)), revwire.rewire(net, x), x


def gradients(model):
    model = model.net if isinstance(model, Reference) else model
    return [p.grad for p in model.parameters()]


def assert_same(wanted, found):
    assert len(wanted) == len(found)
    for w, f in zip(wanted, found, strict=True):
        if w is None or f is None:
            assert w is None
            assert f is None
        else:
            torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-11)


def both(kind, run, dropout=0.0, *, train=True):
    """`run(model, x)` on reference and rewired model from the same random state; then compares all gradients."""
    reference, model, x = pair(kind, dropout)
    results = []
    for m in (reference, model):
        torch.manual_seed(7)
        random.seed(7)
        results.append((run(m.train(train), x.clone()), torch.get_rng_state()))
    assert_same(gradients(reference), gradients(model))
    assert torch.equal(results[0][1], results[1][1])
    assert_same(list(results[0][0]), list(results[1][0]))
    return reference, model


def loss(out):
    return (out * torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()).sum()


@pytest.mark.parametrize("train", [True, False])
def test_basic(kind, train):
    def run(model, x):
        x.requires_grad_()
        out = model(x)
        loss(out).backward()
        return out, x.grad

    both(kind, run, train=train)


def test_input_without_grad(kind):
    def run(model, x):
        loss(model(x)).backward()
        return ()

    both(kind, run)


def test_the_callers_input_is_kept_intact(kind):
    _, model, x = pair(kind)
    before = x.clone()
    loss(model(x)).backward()
    assert torch.equal(x, before)


def test_a_relu_before_the_chain(kind):
    def run(model, x):
        x.requires_grad_()
        loss(model(nn.functional.relu(x * 1.0, inplace=True))).backward()
        return (x.grad,)

    both(kind, run)


@pytest.mark.parametrize("kind", [Loop, TimmBlocks])
def test_dropout_and_the_generator_afterwards(kind):
    def run(model, x):
        out = model(x)
        loss(out).backward()
        return out, torch.rand(3)

    both(kind, run, dropout=0.4)


def test_batchnorm_statistics_move_once():
    def run(model, x):
        loss(model(x)).backward()
        return ()

    reference, model = both(Convolutional, run)
    for (name, wanted), (_, found) in zip(reference.net.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(wanted, found), name
    assert model.blocks[0].bn.num_batches_tracked == 1


def test_frozen_parameters(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        for i, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(i % 3 == 0)
        loss(model(x)).backward()
        return ()

    both(kind, run)


def test_all_but_the_last_block_frozen(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        parameters = list(net.parameters())
        for parameter in parameters[:-3]:
            parameter.requires_grad_(False)
        loss(model(x)).backward()
        return ()

    both(kind, run)


@pytest.mark.parametrize("kind", [Loop, TimmBlocks, Convolutional])
def test_autocast_around_the_forward_only(kind):
    """Under bf16 the same roundings happen in the second run: no further from plain than bf16 itself is."""
    reference, model, x = pair(kind)
    exact = [g for m in (reference,) for g in (loss(m(x)).backward(), gradients(m))[1]]
    exact = [g.clone() for g in exact]
    outcomes = []
    for m in (reference, model):
        m.float().zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(x.float())
        loss(out.double()).backward()
        outcomes.append(torch.cat([g.flatten().double() for g in gradients(m)]))
    exact = torch.cat([g.flatten() for g in exact])
    assert (outcomes[1] - exact).norm() <= 1.5 * (outcomes[0] - exact).norm()


def test_autograd_grad(kind):
    def run(model, x):
        x.requires_grad_()
        net = model.net if isinstance(model, Reference) else model
        return torch.autograd.grad(loss(model(x)), [x, *net.parameters()])

    both(kind, run)


def test_autograd_grad_of_inner_parameters_only(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        inner = list(net.parameters())[4:6]
        return torch.autograd.grad(loss(model(x)), inner)

    both(kind, run)


def test_double_backward(kind):
    def run(model, x):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
        grad.square().sum().backward()
        return (x.grad,)

    both(kind, run)


def test_backward_twice_with_retain_graph(kind):
    def run(model, x):
        out = loss(model(x))
        out.backward(retain_graph=True)
        out.backward()
        return ()

    both(kind, run)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_the_backwards(kind, dropout, order):
    def run(model, x):
        losses = [loss(model(x)), loss(model(x.flip(0)))]
        for index in order:
            losses[index].backward()
        return ()

    both(kind, run, dropout=dropout)


def test_tied_branches():
    def run(model, x):
        loss(model(x)).backward()
        return ()

    torch.manual_seed(0)
    net = Loop().double()
    net.layers[2][1] = net.layers[0][1]
    x = torch.randn(SHAPES[Loop], dtype=torch.float64)
    reference, model = Reference(copy.deepcopy(net)), revwire.rewire(net, x)
    for m in (reference, model):
        run(m, x)
    assert_same(gradients(reference), gradients(model))


def test_functional_call_with_other_weights(kind):
    reference, model, x = pair(kind)
    grads = []
    for m in (reference, model):
        net = m.net if isinstance(m, Reference) else m
        prefix = "net." if isinstance(m, Reference) else ""
        source = [p.detach().clone().requires_grad_() for p in net.parameters()]
        other = {prefix + n: s * 1.5 for (n, _), s in zip(net.named_parameters(), source, strict=True)}
        out = loss(torch.func.functional_call(m, other, (x,)))
        del other
        out.backward()  # the module has its own weights back by now
        assert all(p.grad is None for p in net.parameters())
        grads.append([s.grad for s in source])
    assert_same(*grads)


def test_weights_changed_in_place_before_backward_raise(kind):
    _, model, x = pair(kind)
    out = loss(model(x))
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    with pytest.raises(ReplayError, match=r"changed in place between forward and backward.*optimizer\.step"):
        out.backward()


def test_module_hooks_that_change_outputs(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        modules = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        handles = [m.register_forward_hook(lambda _m, _i, out: out * 1.25) for m in modules]
        loss(model(x)).backward()
        for handle in handles:
            handle.remove()
        return ()

    both(kind, run)


def test_backward_hooks_fire_once(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        seen = []
        modules = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        handles = [
            m.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0].clone())) for m in modules
        ]
        parameter = next(net.parameters())
        handles.append(parameter.register_hook(lambda grad: grad * 2))
        loss(model(x.requires_grad_())).backward()
        for handle in handles:
            handle.remove()
        return seen

    both(kind, run)


def test_no_leak_when_the_graph_is_dropped(kind):
    _, model, x = pair(kind)
    gc.collect()
    gc.disable()
    try:
        for finish in (lambda out: None, lambda out: loss(out).backward()):
            seen = []
            handle = next(
                m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
            ).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(weakref.ref(out)))
            out = model(x)
            finish(out)
            handle.remove()
            kept = weakref.ref(out)
            del out
            assert kept() is None
            assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_no_leak_after_an_error_in_backward(kind):
    _, model, x = pair(kind)

    def fail(_grad):
        raise ValueError("stop")

    handle = next(model.parameters()).register_hook(fail)
    gc.collect()
    gc.disable()
    try:
        out = model(x)
        with pytest.raises(ValueError, match="stop"):
            loss(out).backward()
        handle.remove()
        kept = weakref.ref(out)
        del out
        assert kept() is None
    finally:
        gc.enable()
    model.zero_grad()
    loss(model(x)).backward()


@pytest.mark.parametrize("grad", [True, False])
def test_eval_with_and_without_grad(kind, grad):
    reference, model, x = pair(kind)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model.eval()(x), reference.eval()(x))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference(x))


def test_deepcopy(kind):
    _, model, x = pair(kind)
    duplicate = copy.deepcopy(model)
    loss(duplicate(x)).backward()
    assert all(g is None for g in gradients(model))
    loss(model(x)).backward()
    assert_same(gradients(model), gradients(duplicate))
    assert revwire.plan_of(duplicate) == revwire.plan_of(model)


def test_saving_the_whole_model(kind, tmp_path):
    _, model, x = pair(kind)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loss(loaded(x)).backward()
    loss(model(x)).backward()
    assert_same(gradients(model), gradients(loaded))
    assert type(revwire.unwire(loaded)) is kind


def test_gradient_accumulation(kind):
    def run(model, x):
        for part in x.chunk(2):
            loss(model(part)).backward()
        return ()

    both(kind, run)


@pytest.mark.parametrize("on", [(0,), (1,), (0, 1)])
def test_losses_on_taps(on):
    """Taps of the trunk inside the chain, with a loss on the taps, on the output, or on both."""

    class Tapped(Loop):
        def forward(self, x):
            attn, ff = self.layers[0]
            x = attn(x) + x
            x = ff(x) + x
            tap = x.sin()
            for attn, ff in self.layers[1:]:
                x = attn(x) + x
                x = ff(x) + x
            return tap, x

    torch.manual_seed(0)
    net = Tapped().double()
    x = torch.randn(SHAPES[Loop], dtype=torch.float64)
    reference, model = copy.deepcopy(net), revwire.rewire(net, x)
    outs = model(x)
    previous = current = x
    wanted = []
    for i, branch in enumerate(reference.branches()):
        previous, current = current, previous + branch(current)
        if i == 1:
            wanted.append(((previous + current) / 2).sin())
    wanted.append((previous + current) / 2)
    sum(loss(wanted[i]) for i in on).backward()
    sum(loss(outs[i]) for i in on).backward()
    assert_same(list(wanted), list(outs))
    for w, f in zip(gradients(reference), gradients(model), strict=True):
        assert_same([w], [f])


def test_a_side_input_changed_in_place_raises():
    class Net(Loop):
        def forward(self, x, mask):
            for attn, ff in self.layers:
                x = attn(x) * mask + x
                x = ff(x) * mask + x
            return x

    net, x = Net(), torch.randn(SHAPES[Loop])
    mask = torch.rand(SHAPES[Loop][-1:])
    model = revwire.rewire(net, (x, mask))
    out = loss(model(x, mask))
    mask.mul_(2)
    with pytest.raises(ReplayError, match="beside the trunk"):
        out.backward()


def test_eval_statistics_that_move_between_forward_and_backward():
    """A forward in eval mode, one in train mode, then the first one's backward: its statistics are as they were."""
    reference, model, x = pair(Convolutional)
    wanted = gradients(reference) if loss(reference.eval()(x)).backward() is None else None
    out = loss(model.eval()(x))
    model.train()(x * 3)
    out.backward()
    assert_same(wanted, gradients(model))


def test_spectral_norm_in_a_branch():
    class Net(Loop):
        def __init__(self, dropout=0.0):
            super().__init__(dropout)
            for pair in self.layers:
                nn.utils.parametrizations.spectral_norm(pair[0][1])

    torch.manual_seed(0)
    net = Net().double().train()
    x = torch.randn(SHAPES[Loop], dtype=torch.float64)
    reference, model = Reference(copy.deepcopy(net)), revwire.rewire(net, x)
    for m in (reference, model):
        loss(m(x)).backward()
    assert_same(gradients(reference), gradients(model))
    for wanted, found in zip(reference.buffers(), model.buffers(), strict=True):
        assert torch.equal(wanted, found)


def test_a_branch_that_draws_python_random_numbers():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) * random.random()

    torch.manual_seed(0)
    net = Loop().double()
    for attn, _ in net.layers:
        attn[1] = Noisy(WIDTH, WIDTH).double()
    x = torch.randn(SHAPES[Loop], dtype=torch.float64)
    reference, model = Reference(copy.deepcopy(net)), revwire.rewire(net, x)
    for m in (reference, model):
        random.seed(3)
        loss(m(x)).backward()
        after = random.random()
    random.seed(3)
    loss(reference.net(x))
    assert after == random.random()
    assert_same(gradients(reference), gradients(model))


def test_a_trunk_changed_in_place_between_blocks_leaves_the_chain():
    class Net(Loop):
        def forward(self, x):
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
                x = x.mul_(0.5)
            return x

    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(SHAPES[Loop], dtype=torch.float64)
    reference, model = copy.deepcopy(net), revwire.rewire(net, x)
    trunk = x
    for first, second in reference.layers:
        middle = trunk + first(trunk)
        trunk = (middle + trunk + second(middle)) / 2 * 0.5
    loss(trunk).backward()
    loss(model(x)).backward()
    assert_same(gradients(reference), gradients(model))
