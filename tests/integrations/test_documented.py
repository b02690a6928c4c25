"""The code of docs/integrations.md runs from top to bottom, and what it says of torch.func."""

import re
from pathlib import Path

import pytest
import torch
from nets import assert_same, pair
from torch.func import functional_call, grad

import revwire

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


# torch's own: what it deprecates and calls, and one process with itself on the CPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_code_blocks_run(capsys):
    torch.manual_seed(0)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "torch.Size([8, 17, 48])" in printed
    assert "Total params" in printed


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
