"""What model code may do to the trunk between two rewired blocks: it works as on a tensor, or it raises."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revwire
from revwire import RevwireError
from tests.helpers.nets import WIDTH, Residual, assert_same, gradients, loss, recur


class Blocks(nn.Module):
    """Four blocks; `middle` runs on the trunk between the second and the third, once the model is rewired."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            Residual(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)
        )
        self.middle = None

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1 and self.middle is not None:
                x = self.middle(x)
        return x


class Leaving:
    """The recurrence of `Blocks` that leaves the chain in the middle and enters another one."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        first, second = self.net.blocks[:2], self.net.blocks[2:]
        x = self.net.middle(recur(x, [b.body for b in first]))
        return recur(x, [b.body for b in second])


class Staying(Leaving):
    """The recurrence that goes on after the middle, which looks at the trunk and hands it back."""

    def __call__(self, x):
        previous = current = x
        for i, block in enumerate(self.net.blocks):
            previous, current = current, previous + block.body(current)
            if i == 1:
                self.net.middle((previous + current) / 2)
        return (previous + current) / 2


def x_of(seed=0):
    return torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(middle):
    torch.manual_seed(0)
    net = Blocks().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x_of())
    reference.middle = model.middle = middle
    return reference, model


def agree(recurrence, middle, extra=lambda: ()):
    """Outputs, gradients, and the losses that `middle` left in `extra()`."""
    reference, model = pair(middle)
    found = []
    for run, net in ((recurrence(reference), reference), (model, model)):
        x = x_of().requires_grad_()
        out = run(x)
        sum(map(loss, (out, *extra()))).backward()
        found.append([out, x.grad, *gradients(net)])
    assert_same(*found)


def add_to_a_slice(x):
    x[:, 0].add_(1)
    return x


def add_through_a_name(x):
    tokens = x[:, 1:3]
    tokens += 1
    return x


def set_items(x):
    x[:, 0] = x[:, 1] * 2
    return x


def scale(x):
    x.mul_(0.5)
    return x


def scale_a_detached_view(x):
    with torch.no_grad():
        x[0].mul_(0.5)
    return x


def write_into(x):
    x.copy_(x * 2)
    return x


def detach(x):
    x.detach_()
    return x


@pytest.mark.parametrize(
    "middle",
    [add_to_a_slice, add_through_a_name, set_items, scale, scale_a_detached_view, write_into, detach],
)
def test_a_trunk_changed_in_place_leaves_the_chain(middle):
    # the merged tensor by hand is changed like any other: autograd refuses none of these
    agree(Leaving, middle)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("middle", [add_to_a_slice, set_items, scale])
def test_a_trunk_changed_in_place_without_grad_leaves_the_chain(middle, mode):
    reference, model = pair(middle)
    with mode():
        assert_same([Leaving(reference)(x_of())], [model(x_of())])


def view_changes(x):
    x.view(2, 2, WIDTH).add_(1)
    return x


def transposed_changes(x):
    x.t().mul_(2)
    return x


def base_changes(x):
    view = x.unsqueeze(0)
    x.mul_(2)
    return view.squeeze(0)


def slice_of_view_changes(x):
    x.view(2, 2, WIDTH)[0] = 1
    return x


@pytest.mark.parametrize("middle", [view_changes, transposed_changes, base_changes, slice_of_view_changes])
def test_a_trunk_changed_in_place_through_a_view_raises(middle):
    _, model = pair(middle)
    with pytest.raises(RevwireError, match="changed in place through a view"):
        model(x_of())


@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_a_gradient_hook_on_the_trunk_raises(name):
    """There is no gradient of the one tensor: a hook would never fire, or see part of it."""

    def middle(x):
        getattr(x, name)(*[lambda grad: grad * 2] * (name == "register_hook"))
        return x

    _, model = pair(middle)
    with pytest.raises(RevwireError, match="the gradient there belongs to two streams"):
        model(x_of())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_first_look_without_grad_takes_nothing_from_the_next(mode):
    taps = []

    def middle(x):
        with mode():
            assert x.norm() > 0
        taps[:] = [x.sin()]
        return x

    agree(Staying, middle, lambda: taps)


def test_taps_through_many_functions():
    """Indexing, writing into other tensors, overloaded functions of every kind, custom operators."""
    taps = []

    def middle(x):
        buffer = torch.zeros(2, *x.shape, dtype=x.dtype)
        buffer[0] = x
        buffer[1].copy_(x)
        buffer[0] += x
        buffer[1].add_(x)
        products = torch.einsum("ij,kj->ik", x, x) + x @ x.mT
        joined = torch.cat([x, torch.where(x > 0, x, -x)]) * torch.linalg.norm(x)
        taps[:] = [buffer, products, joined, torch.stack([x, x]), torch.ops.aten.exp.default(x), 1 - x / 2]
        return x

    agree(Staying, middle, lambda: taps)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, on the reference as well
def test_a_compiled_function_on_the_trunk():
    taps, compiled = [], torch.compile(lambda t: t.sin() * 2, backend="eager")

    def middle(x):
        taps[:] = [compiled(x)]
        return x

    agree(Staying, middle, lambda: taps)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("function", [Reverse, Square])
def test_an_autograd_function_on_the_trunk_raises_and_works_on_its_tensor(function):
    """Autograd sees tensors only: the gradient would be cut without a word."""
    taps = []

    def middle(x, tensor=lambda x: x):
        taps[:] = [function.apply(tensor(x))]
        return x

    _, model = pair(middle)
    with pytest.raises(RevwireError, match=rf"{function.__name__}, an autograd.Function.*x\.tensor\(\)"):
        model(x_of())
    agree(Staying, lambda x: middle(x, lambda t: t.tensor() if hasattr(t, "tensor") else t), lambda: taps)


class Checkpointed(Blocks):
    options = None

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            on = self.options and i >= self.options["first"]
            x = checkpoint(block, x, use_reentrant=self.options["reentrant"]) if on else block(x)
        return x


def test_checkpointed_blocks():
    torch.manual_seed(0)
    net = Checkpointed().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x_of())
    model.options = {"first": 0, "reentrant": False}
    loss(recur(x_of(), [b.body for b in reference.blocks])).backward()
    loss(model(x_of())).backward()
    assert_same(gradients(reference), gradients(model))
    # the other kind hides what it runs from autograd, which sees no tensor go in
    model.options = {"first": 1, "reentrant": True}
    unseen = pytest.warns(UserWarning, match="None of the inputs have requires_grad=True")
    with unseen, pytest.raises(RevwireError, match="use_reentrant=False"):
        model(x_of().requires_grad_())
    model.options = {"first": 0, "reentrant": True}
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        model(x_of().requires_grad_())


def test_a_fork_continues_once():
    """The first of two continuations goes on with the streams, the second one enters with the merged tensor."""

    class Fork(Blocks):
        def forward(self, x):
            x = self.blocks[1](self.blocks[0](x))
            one, other = self.blocks[2](x), self.blocks[3](x)
            return self.blocks[2](one), self.blocks[3](other)

    torch.manual_seed(0)
    net = Fork().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x_of())
    f = [b.body for b in reference.blocks]
    middle = recur(x_of(), f[:2])
    wanted = recur(x_of(), [*f[:3], f[2]]), recur(middle, [f[3], f[3]])
    found = model(x_of())
    assert_same(wanted, found)
    for order in (wanted, found):
        (loss(order[0]) + loss(order[1]).sin()).backward()
    assert_same(gradients(reference), gradients(model))


def test_a_block_that_raises_leaves_its_chain_usable():
    class Careful(Blocks):
        def forward(self, x):
            for block in self.blocks:
                try:
                    x = block(x)
                except ArithmeticError:
                    continue
            return x

    torch.manual_seed(0)
    net = Careful().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x_of())

    def fail(*_):
        raise ArithmeticError

    model.blocks[2].body[1].register_forward_hook(fail)
    loss(recur(x_of(), [b.body for i, b in enumerate(reference.blocks) if i != 2])).backward()
    loss(model(x_of())).backward()
    assert_same(
        [g for g in gradients(reference) if g is not None], [g for g in gradients(model) if g is not None]
    )


def change(_module, _args, out):
    scale(out)


def test_hooks_on_blocks():
    """A forward hook on a block that replaces or changes the trunk, and a pre-hook, leave the chain there."""
    for register in (
        lambda block, hook: block[1].register_forward_hook(lambda _m, _a, out: hook(out)),
        lambda block, hook: block[2].register_forward_pre_hook(lambda _m, args: (hook(args[0]),)),
    ):
        reference, model = pair(None)
        reference.middle = torch.sin
        register(model.blocks, torch.sin)
        assert_same([Leaving(reference)(x_of())], [model(x_of())])
    reference, model = pair(None)
    reference.middle = scale
    model.blocks[1].register_forward_hook(change)
    assert_same([Leaving(reference)(x_of())], [model(x_of())])


def test_a_trunk_of_many_dimensions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = rearranged(x + layer(x))
            return x

    def rearranged(x):
        x = x.reshape(1, 1, 2, 1, 2, 1, 1, 1, WIDTH)
        return x.permute(0, 1, 4, 2, 3, 5, 6, 7, 8).reshape(4, WIDTH)

    net = Net().double()
    reference, model = copy.deepcopy(net), revwire.rewire(net, x_of())
    previous = current = x_of()
    for layer in reference.layers:
        previous, current = rearranged(current), rearranged(previous + layer(current))
    loss((previous + current) / 2).backward()
    loss(model(x_of())).backward()
    assert_same(gradients(reference), gradients(model))
