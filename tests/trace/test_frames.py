"""Frames as people write them, in one forward or many: what a rewritten forward must reproduce."""

import functools
import gc
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F  # noqa: N812 - its usual name

import revwire
from tests.helpers.agreement import WIDTH, Bodied, agrees, inputs


class Written(nn.Module):
    """A net in one forward; subclasses write it."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.scale = nn.Parameter(torch.full((1,), 0.3))


def test_a_loop_in_one_forward():
    class Net(Written):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh() + x
            return x.relu()

    agrees(Net, inputs(), steps=3)


def test_parameters_the_frame_computes_with_keep_their_gradients():
    class Net(Written):
        def forward(self, x):
            for layer in self.layers:
                x = x + torch.sigmoid(self.scale) * layer(x)
            return x

    agrees(Net, inputs(), steps=3)


def test_a_side_input_made_in_the_frame():
    class Net(Written):
        def forward(self, x):
            positions = torch.arange(x.shape[1], dtype=x.dtype) * self.scale
            for layer in self.layers:
                x = x + layer(x * positions)
            return x

    agrees(Net, inputs(), steps=3)
    assert {s for step in revwire.plan(Net(), inputs().float()).steps for s in step.sides}


def test_tuples_dicts_and_shapes_in_between():
    class Attention(nn.Linear):
        def forward(self, x, mask=None):
            out = super().forward(x)
            return (out if mask is None else out * mask), {"norm": out.norm()}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attention(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask=None):
            batch, width = x.shape
            out, extra = self.attn(x, mask=mask)
            assert extra["norm"].shape == ()
            x = x + out.reshape(batch, width)
            x = x.unflatten(1, (2, width // 2)).transpose(1, 2)
            x = x + self.mlp(x.transpose(1, 2).reshape(batch, -1)).reshape(batch, 2, -1).transpose(1, 2)
            return x.transpose(1, 2).flatten(1)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=4)


def test_functional_dropout_follows_train_and_eval_mode():
    class Block(Bodied):
        def forward(self, x):
            return x + F.dropout(self.body(x), 0.5, self.training)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(64, WIDTH), steps=2)


def test_changes_in_place_are_followed_whatever_name_is_used_after_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act = nn.Linear(WIDTH, WIDTH), nn.Hardswish(inplace=True)

        def forward(self, x):
            out = self.body(x)
            out.mul_(0.5)
            part = out[:, 1:]
            part += 0.1
            out[0] = out[1] * 2
            self.act(part)
            return out * 0.7 + x

    agrees(lambda: nn.Sequential(Block(), Block(), Block()), inputs(), steps=3)


class Append(nn.Sequential):
    def forward(self, x, seen):
        for layer in self:
            x = layer(x)
            seen.append(x)
        return torch.cat(seen, dim=1)


def test_a_child_that_appends_to_a_list_it_is_given():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs, self.join = (
                Append(*(nn.Linear(WIDTH, WIDTH) for _ in range(2))),
                nn.Linear(3 * WIDTH, WIDTH),
            )

        def forward(self, x):
            return self.join(self.convs(x, [x])) + x

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=2)


def test_proxies_are_no_tensors_to_torch_s_own_code():
    """`torch.pow(Scalar, Tensor)` asks whether its first argument is a tensor, and would read a proxy's memory."""

    class Block(Bodied):
        def forward(self, x):
            h = self.body(x)
            assert isinstance(h, torch.Tensor)
            assert not isinstance(h, nn.Parameter)
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
            return x + torch.pow(1.5, h) * torch.clamp(h, min=-1.0)

    agrees(lambda: nn.Sequential(Block(), Block()), inputs(), steps=2)


@functools.lru_cache(maxsize=8)
def table(width, dtype):
    return torch.linspace(0.5, 1.5, width, dtype=dtype)


def closed_over():
    kept = functools.lru_cache(maxsize=8)(lambda width, dtype: torch.linspace(1, 2, width, dtype=dtype))

    def call(width, dtype):
        return kept(width, dtype)

    return call


other_table = closed_over()


def test_cached_tables_are_none_of_planning_s():
    class Block(Bodied):
        def forward(self, x):
            return x + self.body(x * table(x.shape[1], x.dtype) + other_table(x.shape[1], x.dtype))

    net, x = nn.Sequential(Block(), Block()).double(), inputs()
    revwire.plan(net, x)
    assert table.cache_info().currsize == 0
    wanted = net(x)
    assert type(table(WIDTH, torch.float64)) is torch.Tensor
    revwire.plan(net, x)
    torch.testing.assert_close(net(x), wanted)


def test_nothing_that_planning_computed_with_stays():
    """A ReLU saves its own output: kept by a hook as it is, it would hold itself and the graph before it for good."""

    class Net(Written):
        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).relu()
            return x

    def living():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is FakeTensor]

    others = living()
    before = set(map(id, others))
    model = revwire.rewire(Net(), inputs().float())
    model(inputs().float()).sum().backward()
    assert not [tensor for tensor in living() if id(tensor) not in before]
    del others


def test_a_forward_that_sets_a_mode_is_no_graph():
    """Norms frozen by the forward itself: a graph of it would leave them as the trainer has put them."""

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            self.norm.eval()
            return x + self.norm(self.f(x)).tanh()

    model = nn.Sequential(Frozen(), Frozen(), Frozen()).double()
    with pytest.raises(revwire.RewireError, match="sets the mode"):
        revwire.rewire(model, inputs())
    assert all(module.training for module in model.modules())
