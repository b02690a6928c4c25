"""What products of float32 tensors are computed in (tf32, bf16): as in forward, and no news to the check of numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.backends import cuda, cudnn, mkldnn

import revwire
from revwire.run.ambient import Float32
from tests.helpers.nets import Residual

WIDTH, DEPTH = 6, 4
PRODUCTS = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def settings():
    return [product.fp32_precision for product in PRODUCTS]


@pytest.fixture(autouse=True)
def _everything_as_it_was():
    was = settings()
    yield
    for product, precision in zip(PRODUCTS, was, strict=True):
        product.fp32_precision = precision
    torch.set_float32_matmul_precision("highest")


def net(branch):
    return nn.Sequential(*(Residual(*branch()) for _ in range(DEPTH)))


@pytest.mark.parametrize("of_forward", ["tf32", "bf16"])
def test_the_second_run_has_them_as_in_forward_and_they_come_back(of_forward):
    seen, x = [], torch.randn(5, WIDTH)
    model = revwire.rewire(net(lambda: [nn.Linear(WIDTH, WIDTH), nn.Tanh()]), x)
    for block in model:
        block.body[0].register_forward_hook(lambda *_: seen.append(settings()))
    mkldnn.matmul.fp32_precision = of_forward
    cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()  # so this is what nobody may ask now
    loss = model(x).sum()
    mkldnn.matmul.fp32_precision = "ieee"
    cudnn.conv.fp32_precision = "tf32"
    between = settings()
    loss.backward()
    assert settings() == between
    assert len(seen) == 2 * DEPTH
    assert all(found == seen[0] for found in seen)


@pytest.mark.parametrize(("device", "epsilon"), [("cpu", 2.0**-7), ("cuda", 2.0**-10)])
def test_what_is_left_of_float32(device, epsilon):
    for product in PRODUCTS:
        product.fp32_precision = "ieee"
    assert Float32.now().epsilon(torch.device(device)) == 0.0
    mkldnn.matmul.fp32_precision, cudnn.conv.fp32_precision = "bf16", "tf32"
    assert Float32.now().epsilon(torch.device(device)) == epsilon


CALLS = []


class Rounded(nn.Module):
    """A little off each time it runs again, as products of slightly other numbers are after rounding."""

    def forward(self, x):
        CALLS.append(x)
        return x * (1.0 if len(CALLS) <= DEPTH else 1.005)


@pytest.mark.parametrize(("precision", "same"), [("ieee", False), ("tf32", True), ("bf16", True)])
def test_numbers_may_differ_by_the_rounding_of_products(precision, same):
    mkldnn.matmul.fp32_precision = precision
    x = torch.randn(64, WIDTH)
    model = revwire.rewire(net(lambda: [nn.Linear(WIDTH, WIDTH), Rounded(), nn.Linear(WIDTH, WIDTH)]), x)
    CALLS.clear()
    loss = model(x).square().mean()
    with nullcontext() if same else pytest.raises(revwire.ReplayError, match="other numbers"):
        loss.backward()
    assert len(CALLS) > DEPTH
