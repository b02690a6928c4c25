"""What model code does with the trunk between two rewired blocks: it works as on a tensor, or it raises."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from revwire import RevwireError
from revwire.pytree import tree_map
from tests.helpers.middle import Blocks, Leaving, Staying, agree, noise, pair
from tests.helpers.nets import WIDTH, assert_same, gradients, loss, recur


@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_a_gradient_hook_on_the_trunk_raises(name):
    """There is no gradient of the one tensor: a hook would never fire, or see part of it."""

    def middle(x):
        getattr(x, name)(*[lambda grad: grad * 2] * (name == "register_hook"))
        return x

    _, model = pair(middle)
    with pytest.raises(RevwireError, match="the gradient there belongs to two streams"):
        model(noise())


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


class Rearranged(Reverse):
    """Of both streams, as long as it is given them."""

    @staticmethod
    def forward(ctx, x):
        return x.reshape(4, WIDTH)


@pytest.mark.parametrize("function", [Reverse, Square, Rearranged])
def test_an_autograd_function_on_the_trunk_raises_and_works_on_its_tensor(function):
    """Autograd sees tensors only: the gradient would be cut without a word."""
    taps = []

    def middle(x, tensor=lambda x: x):
        taps[:] = [function.apply(tensor(x))]
        return x

    _, model = pair(middle)
    with pytest.raises(RevwireError, match=rf"{function.__name__}, an autograd.Function.*x\.tensor\(\)"):
        model(noise())
    agree(Staying, lambda x: middle(x, lambda t: t.tensor() if hasattr(t, "tensor") else t), lambda: taps)


def test_streams_cast_by_whoever_maps_the_tensors_between_blocks_raise():
    """As FSDP2's mixed precision does, unless told otherwise."""
    _, model = pair(lambda x: tree_map(lambda t: t.bfloat16(), x))
    with pytest.raises(RevwireError, match=r"2#0: the streams .* were cast to torch\.bfloat16"):
        model(noise())
    agree(Staying, lambda x: tree_map(lambda t: t * 1, x))


def test_the_trunk_has_none_of_a_tensors_protocols():
    """Copying it or handing it to another library would take the merged tensor for all there is."""
    names, seen = ("__deepcopy__", "__array__", "__dlpack__", "__reduce__"), []
    _, model = pair(lambda x: seen.append([hasattr(x, name) for name in names]) or x)
    model(noise())
    assert seen == [[False, False, False, True]]  # the last one is any object's


class Checkpointed(Blocks):
    options = None

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            on = self.options and i >= self.options["first"]
            x = checkpoint(block, x, use_reentrant=self.options["reentrant"]) if on else block(x)
        return x


def test_checkpointed_blocks():
    reference, model = pair(make=Checkpointed)
    model.options = {"first": 0, "reentrant": False}
    loss(recur(noise(), [b.body for b in reference.blocks])).backward()
    loss(model(noise())).backward()
    assert_same(gradients(reference), gradients(model))
    # the other kind hides what it runs from autograd, which sees no tensor go in
    model.options = {"first": 1, "reentrant": True}
    unseen = pytest.warns(UserWarning, match="None of the inputs have requires_grad=True")
    with unseen, pytest.raises(RevwireError, match="use_reentrant=False"):
        model(noise().requires_grad_())
    model.options = {"first": 0, "reentrant": True}
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        model(noise().requires_grad_())


def test_a_fork_continues_once():
    """The first of two continuations goes on with the streams, the second one enters with the merged tensor."""

    class Fork(Blocks):
        def forward(self, x):
            x = self.blocks[1](self.blocks[0](x))
            one, other = self.blocks[2](x), self.blocks[3](x)
            return self.blocks[2](one), self.blocks[3](other)

    reference, model = pair(make=Fork)
    f = [b.body for b in reference.blocks]
    middle = recur(noise(), f[:2])
    wanted = recur(noise(), [*f[:3], f[2]]), recur(middle, [f[3], f[3]])
    found = model(noise())
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

    reference, model = pair(make=Careful)

    def fail(*_):
        raise ArithmeticError

    model.blocks[2].body[1].register_forward_hook(fail)
    loss(recur(noise(), [b.body for i, b in enumerate(reference.blocks) if i != 2])).backward()
    loss(model(noise())).backward()
    assert_same(
        [g for g in gradients(reference) if g is not None], [g for g in gradients(model) if g is not None]
    )


def halve(x):
    x.mul_(0.5)
    return x


def change(_module, _args, out):
    halve(out)


def test_hooks_on_blocks():
    """A forward hook on a block that replaces or changes the trunk, and a pre-hook, leave the chain there."""
    for register in (
        lambda block, hook: block[1].register_forward_hook(lambda _m, _a, out: hook(out)),
        lambda block, hook: block[2].register_forward_pre_hook(lambda _m, args: (hook(args[0]),)),
    ):
        reference, model = pair()
        reference.middle = torch.sin
        register(model.blocks, torch.sin)
        assert_same([Leaving(reference)(noise())], [model(noise())])
    reference, model = pair()
    reference.middle = halve
    model.blocks[1].register_forward_hook(change)
    assert_same([Leaving(reference)(noise())], [model(noise())])


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

    reference, model = pair(make=Net)
    previous = current = noise()
    for layer in reference.layers:
        previous, current = rearranged(current), rearranged(previous + layer(current))
    loss((previous + current) / 2).backward()
    loss(model(noise())).backward()
    assert_same(gradients(reference), gradients(model))
