"""A trunk that is cut in pieces at a block's end and joined at the next one's start, as joint transformers do it."""

import pytest
import torch
from torch import nn

import revwire
from revwire.run.pieces import Piece, Slice, joined, slices_of
from tests.helpers.nets import WIDTH, assert_same, gradients, loss, recur, stir
from tests.helpers.steps import kept

TEXT, IMAGE = 3, 6


class Block(nn.Module):
    """Text and image, joined, one residual, cut again."""

    def __init__(self, way="index"):
        super().__init__()
        self.way = way
        self.norm, self.ff = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def branch(self, x):
        return self.ff(self.norm(x))

    def forward(self, image, text):
        count = text.shape[1]
        both = torch.cat([text, image], dim=1)
        both = both + self.branch(both)
        if self.way == "index":
            return both[:, count:], both[:, :count, ...]
        if self.way == "split":
            text, image = both.split([count, both.shape[1] - count], dim=1)
        elif self.way == "tensor_split":
            text, image = torch.tensor_split(both, (count,), 1)
        else:
            text, image = both.narrow(-2, 0, count), torch.narrow(both, 1, count, both.shape[1] - count)
        return image, text


class Net(nn.Module):
    """Blocks, of which the image goes on."""

    def __init__(self, way="index", depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(way) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, image, text):
        for block in self.blocks:
            image, text = block(image, text)
        return self.head(image)


class Recurrence(nn.Module):
    """The same by hand."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image, text):
        both = recur(torch.cat([text, image], 1), [block.branch for block in self.net.blocks])
        return self.net.head(both[:, text.shape[1] :])


def inputs(image=IMAGE, text=TEXT):
    return tuple(torch.randn(2, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (image, text))


def step(model, given):
    for tensor in given:
        tensor.grad = None
    model.zero_grad()
    out = model(*given)
    loss(out).backward()
    return [out.detach(), *gradients(model), *(tensor.grad for tensor in given)]


@pytest.mark.parametrize("way", ["index", "split", "tensor_split", "narrow"])
@pytest.mark.parametrize("training", [True, False])
def test_one_chain_goes_through_the_pieces(way, training):
    net = stir(Net(way).double()).train(training)
    given = inputs()
    model = revwire.rewire(net, given)
    (chain,) = revwire.plan_of(model).chains
    assert len(chain.steps) == 4
    for case in (given, inputs(), inputs(image=4), inputs(text=5)):
        wanted = step(Recurrence(net), case)
        assert_same(wanted, step(model, case))
    assert revwire.verify(model, given).ok


def test_nothing_is_held_for_the_pieces():
    """Held is a chain's end, however many blocks there are."""
    held = []
    for depth in (2, 8):
        model = revwire.rewire(stir(Net(depth=depth).double()), inputs())
        given = [tensor.detach() for tensor in inputs()]
        memory = {}

        def pack(tensor, memory=memory):
            memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*given)
        held.append(sum(memory.values()))
    assert held[0] == held[1]


@pytest.mark.parametrize("coupling", ["dr2net(alpha=0.9,beta=0.9)", "momentum(gamma=0.8)"])
def test_other_couplings(coupling):
    model = revwire.rewire(stir(Net().double()), inputs(), coupling=coupling)
    for case in (inputs(), inputs(image=5)):
        assert_same(step(kept(model), case), step(model, case))


class Copying(nn.Module):
    """Hands a block copies of what it is given, as who maps the tensors of a module's arguments does (FSDP2)."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *given):
        leaves, spec = torch.utils._pytree.tree_flatten(given)
        return self.block(*torch.utils._pytree.tree_unflatten([leaf.view_as(leaf) for leaf in leaves], spec))


def test_pieces_whose_tensors_were_mapped_are_joined():
    net = stir(Net().double())
    given = inputs()
    model = revwire.rewire(net, given)
    wanted = step(model, given)
    entered = []
    enter = revwire.Streams.enter
    for index, block in enumerate(model.blocks):
        model.blocks[index] = Copying(block)
    try:
        revwire.Streams.enter = lambda *args: entered.append(1) or enter(*args)
        found = step(model, given)
    finally:
        revwire.Streams.enter = enter
    assert_same(wanted, found)
    assert len(entered) == 1


class Between(Net):
    """Code between the blocks, on the pieces."""

    between = None

    def forward(self, image, text):
        for block in self.blocks:
            image, text = type(self).between(*block(image, text))
        return self.head(image)


def in_place(image, text):
    image.mul_(1.5)
    return image, text


@pytest.mark.parametrize(
    "between",
    [
        in_place,
        lambda image, text: (image * 1.5, text),
        lambda image, text: (image[:, 1:], text),
        lambda image, text: (image.flip(1), text),
        lambda image, text: (text, image),
        lambda image, text: (image, text.clone()),
    ],
)
def test_pieces_that_are_not_what_was_cut_make_no_chain(monkeypatch, between):
    monkeypatch.setattr(Between, "between", staticmethod(between))
    net = Between().double()
    plan = revwire.plan(net, inputs())
    assert not plan.chains
    assert "stands alone" in plan.skipped[0].reason


def test_pieces_look_like_tensors(monkeypatch):
    """Code that looks at them, and takes their values, beside the chain."""
    seen = []

    def look(image, text):
        assert isinstance(image, Piece) == bool(seen)
        seen.append(
            (image.mean() + text.sum(), image.shape, len(text), text.size(1), image.dtype, image.device)
        )
        assert image.requires_grad
        assert repr(image)
        return image, text

    monkeypatch.setattr(Between, "between", staticmethod(lambda image, text: (image, text)))
    net = stir(Between().double())
    given = inputs()
    model = revwire.rewire(net, given)
    assert len(revwire.plan_of(model).steps) == 4
    seen.append(None)
    monkeypatch.setattr(
        Between, "between", staticmethod(lambda i, t: look(i, t) if isinstance(i, Piece) else (i, t))
    )
    out = model(*given)
    assert len(seen) == 4
    for _, size, length, count, dtype, device in seen[1:]:
        assert (size, length, count) == ((2, IMAGE, WIDTH), 2, TEXT)
        assert (dtype, device.type) == (torch.float64, "cpu")
    branches = [block.branch for block in net.blocks]
    merged = recur(torch.cat(given[::-1], 1), branches[:1])
    assert torch.allclose(seen[1][0], merged[:, TEXT:].mean() + merged[:, :TEXT].sum())
    (loss(out) + sum(each[0] for each in seen[1:])).backward()
    found = gradients(net)
    reference = sum(
        (part := recur(torch.cat(given[::-1], 1), branches[:n]))[:, TEXT:].mean() + part[:, :TEXT].sum()
        for n in (1, 2, 3)
    )
    net.zero_grad()
    (loss(Recurrence(net)(*given)) + reference).backward()
    assert_same(gradients(net), found)


def test_a_gradient_hook_on_a_piece_is_refused(monkeypatch):
    monkeypatch.setattr(Between, "between", staticmethod(lambda image, text: (image, text)))
    model = revwire.rewire(Between().double(), inputs())

    def hook(image, text):
        image.register_hook(print)
        return image, text

    monkeypatch.setattr(Between, "between", staticmethod(hook))
    with pytest.raises(revwire.RewireError, match="the gradient there belongs to two streams"):
        model(*inputs())


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "wanted"),
    [
        (torch.Tensor.__getitem__, (slice(None, 3),), {}, Slice(0, 0, 3)),
        (torch.Tensor.__getitem__, ((slice(None), slice(-2, None)),), {}, Slice(1, 4, 2)),
        (torch.Tensor.__getitem__, ((Ellipsis, slice(1, 2)),), {}, Slice(2, 1, 1)),
        (torch.Tensor.__getitem__, (slice(None, None, 2),), {}, None),
        (torch.Tensor.__getitem__, ((slice(0, 2), slice(0, 2)),), {}, None),
        (torch.Tensor.__getitem__, (0,), {}, None),
        (torch.Tensor.__getitem__, ((None, slice(0, 2)),), {}, None),
        (torch.Tensor.__getitem__, ([0, 1],), {}, None),
        (torch.Tensor.__getitem__, (torch.tensor([0, 1]),), {}, None),
        (torch.Tensor.__getitem__, (slice(2, 2),), {}, None),
        (torch.chunk, (2,), {"dim": 1}, [Slice(1, 0, 3), Slice(1, 3, 3)]),
        (torch.Tensor.split, (4, 0), {}, [Slice(0, 0, 4), Slice(0, 4, 1)]),
        (torch.unbind, (), {}, None),
        (torch.neg, (), {}, None),
    ],
)
def test_what_a_call_cuts(function, args, kwargs, wanted):
    assert slices_of(function, torch.Size((5, 6, 4)), args, kwargs) == wanted


@pytest.mark.parametrize(
    ("args", "kwargs", "pieces", "wanted"),
    [
        ((), {"dim": 1}, [Slice(1, 0, 2), Slice(1, 2, 4)], True),
        ((-2,), {}, [Slice(1, 0, 2), Slice(1, 2, 4)], True),
        ((), {"axis": 1}, [Slice(1, 0, 2), Slice(1, 2, 4)], True),
        ((), {}, [Slice(0, 0, 1), Slice(0, 1, 4)], True),
        ((), {}, [Slice(1, 0, 2), Slice(1, 2, 4)], False),
        ((1,), {}, [Slice(1, 2, 4), Slice(1, 0, 2)], False),
        ((1,), {}, [Slice(1, 0, 2), Slice(1, 0, 2), Slice(1, 2, 4)], False),
        ((1,), {}, [Slice(1, 0, 2), Slice(1, 2, 3)], False),
        ((1,), {}, [Slice(1, 0, 2), Slice(0, 2, 4)], False),
        ((1,), {}, [], False),
    ],
)
def test_what_joins_all_pieces(args, kwargs, pieces, wanted):
    assert joined(torch.cat, args, kwargs, pieces, torch.Size((5, 6, 4))) is wanted
    assert not joined(torch.stack, args, kwargs, pieces, torch.Size((5, 6, 4)))
