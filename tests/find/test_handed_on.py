"""What hands a trunk's values on and does no more is seen through, wherever it stands around a sum."""

import pytest
import torch
from torch import nn

import revwire
from revwire import RewireError
from tests.helpers.nets import recur

WIDTH, DEPTH = 16, 4

SKIPS = {
    "as_tensor": torch.as_tensor,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to like": lambda x: x.to(x),
    "type_as": lambda x: x.type_as(x),
    "all": lambda x: x[:, :],
    "all but": lambda x: x[..., :WIDTH],
    "plus nothing": lambda x: x + 0,
    "times one": lambda x: x * 1.0,
    "no dropout": lambda x: nn.functional.dropout(x, 0.0),
    "view": lambda x: x.view(x.shape),
    "expand": lambda x: x.expand(-1, -1),
    "no padding": lambda x: nn.functional.pad(x, (0, 0)),
    "several": lambda x: x.clone().float()[:].contiguous(),
}
OTHERS = {
    "detach": lambda x: x.detach(),
    "dropout": lambda x: nn.functional.dropout(x, 0.1),
    "flip": lambda x: x.flip(0),
    "some": lambda x: nn.functional.pad(x[:, 1:], (1, 0)),
    "one row": lambda x: x[:1].expand_as(x),
    "clamp": lambda x: x.clamp(-100, 100),
    "shift": lambda x: nn.functional.pad(x, (1, -1)),
    "plus one": lambda x: x + 1,
}


class Block(nn.Module):
    def __init__(self, skip=lambda x: x, total=lambda y, x: y):
        super().__init__()
        self.skip, self.total = skip, total
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.total(self.skip(x) + self.mix(self.norm(x)), x)


def net(**how):
    return nn.Sequential(*(Block(**how) for _ in range(DEPTH)))


def by_hand(model, x):
    return recur(x, [lambda y, block=block: block.mix(block.norm(y)) for block in model])


def assert_right(model, x, *, verify=True):
    assert len(list(revwire.plan(model, x).steps)) == DEPTH
    if verify:
        report = revwire.verify(model, x)
        assert report.ok, report
    wanted = by_hand(model, x)
    torch.testing.assert_close(revwire.rewire(model, x)(x), wanted)


@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_is_seen_through(name):
    model = net(skip=SKIPS[name])
    assert_right(model, torch.randn(8, WIDTH))


@pytest.mark.parametrize("name", [name for name in SKIPS if name != "view"])
def test_a_sum_is_seen_through(name):
    model = net(total=lambda y, _: SKIPS[name](y))
    # what casts to float32 cannot be had in float64, with or without revwire
    assert_right(model, torch.randn(8, WIDTH), verify=name not in {"float", "to", "several"})


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_more_is_not(name):
    plan = revwire.plan(net(skip=OTHERS[name]), torch.randn(8, WIDTH))
    assert not plan.chains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_before_the_sum_and_back_after_it(dtype):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return (x.float() + self.mix(self.norm(x.float().type_as(x))).float()).type_as(x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Casting() for _ in range(DEPTH))).to(dtype)
    x = torch.randn(8, WIDTH, dtype=dtype)
    plan = revwire.plan(model, x)
    assert len(list(plan.steps)) == DEPTH
    assert plan.chains[0].steps[0].line.startswith("test_handed_on.py")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = by_hand(model.to(wide), x.to(wide))
    found = revwire.rewire(model.to(dtype), x)(x)
    assert found.dtype == dtype
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)
    report = revwire.verify(nn.Sequential(*(Casting() for _ in range(DEPTH))), x.float())
    assert report.ok, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trunk_that_loses_bits_is_no_skip(dtype):
    model = net(skip=lambda x: x.to(dtype), total=lambda y, x: y.type_as(x))
    assert not revwire.plan(model, torch.randn(8, WIDTH)).chains


def test_a_cast_that_is_not_undone_ends_the_trunk():
    class Growing(Block):
        def forward(self, x):
            return (x.float() + self.mix(self.norm(x))).float()

    model = nn.Sequential(Growing().bfloat16(), Growing())
    assert not revwire.plan(model, torch.randn(8, WIDTH, dtype=torch.bfloat16)).chains


def test_another_shape_or_dtype_is_looked_at_anew():
    class Half(Block):
        def forward(self, x):
            return x[:, :6] + self.mix(self.norm(x))[:, :6]

    model = nn.Sequential(*(Half() for _ in range(DEPTH)))
    x = torch.randn(2, 6, WIDTH)
    revwire.rewire(model, x)
    model(x).sum().backward()
    with pytest.raises(RewireError, match="cannot be rewired as it was planned"):
        model(torch.randn(2, 8, WIDTH))
