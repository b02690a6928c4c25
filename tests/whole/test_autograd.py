"""Beyond the 22 checks of `test_compatibility.py`: taps, things that change between forward and backward, odd branches.

In float64, against plain autograd through the recurrence written out here, which shares no code with revwire: streams
(x, x), next = previous + F(current), mean at the end.
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


def test_all_but_the_last_block_frozen(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        parameters = list(net.parameters())
        for parameter in parameters[:-3]:
            parameter.requires_grad_(False)
        loss(model(x)).backward()
        return ()

    both(kind, run)


def test_autograd_grad_of_inner_parameters_only(kind):
    def run(model, x):
        net = model.net if isinstance(model, Reference) else model
        inner = list(net.parameters())[4:6]
        return torch.autograd.grad(loss(model(x)), inner)

    both(kind, run)


def test_weights_changed_in_place_before_backward_raise(kind):
    _, model, x = pair(kind)
    out = loss(model(x))
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    with pytest.raises(ReplayError, match=r"changed in place between forward and backward.*optimizer\.step"):
        out.backward()


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
