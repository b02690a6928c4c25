"""Planning makes tensors of its own: where the model lies, wherever `torch.set_default_device` would put them."""

import pytest
import timm
import torch

import revwire
from revwire.libraries import interface

MODELS = {
    "resnet18": ((2, 3, 32, 32), {}),
    "vit_tiny_patch16_224": ((2, 3, 32, 32), {"img_size": 32, "depth": 2}),
    "convnext_atto": ((2, 3, 64, 64), {}),
    "cait_xxs24_224": ((2, 3, 32, 32), {"img_size": 32, "depth": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_default_device_changes_no_plan(name):
    shape, arguments = MODELS[name]
    torch.manual_seed(0)
    model, x = timm.create_model(name, **arguments), torch.randn(shape)
    dials = {} if name == "resnet18" else {"chunks": 2}  # BatchNorm mixes samples
    wanted = revwire.plan(model, x, **dials)
    with torch.device("meta"):
        found = revwire.plan(model, x, **dials)
    assert found == wanted
    assert found.chains


def test_example_inputs_are_where_the_model_is():
    model = timm.create_model("resnet18")
    with torch.device("meta"):
        assert interface.noise(model, (3, 32, 32), 2).device.type == "cpu"
