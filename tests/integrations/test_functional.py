"""What docs/integrations.md says of torch.func; its code runs in tests/published."""

import pytest
import torch
from torch.func import functional_call, grad

import revwire
from tests.helpers.nets import assert_same, pair


def test_a_functional_gradient_is_refused_by_torch_and_had_of_the_network_as_it_was():
    reference, model, x = pair("loop")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def of(net):
        return grad(lambda values: functional_call(net, values, (x,)).square().sum())(weights)

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        of(model)
    with revwire.unwired(model):
        found = of(model)
    reference.net(x).square().sum().backward()
    assert_same([p.grad for p in reference.net.parameters()], found.values())
    assert all(type(value) is torch.Tensor for value in found.values())
