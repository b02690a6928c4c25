"""LoRA by peft, before and after rewiring, and layers quantised by torchao: what is there now is what runs."""

import copy

import peft
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import revwire
from tests.helpers.nets import assert_same, loss, pair

CONFIG = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["qkv", "fc1"], init_lora_weights=False)


def adapted(net):
    torch.manual_seed(3)
    return peft.get_peft_model(net, CONFIG)


def trained(model):
    return {n.split("base_model.model.")[-1]: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("first", ["LoRA", "rewiring"])
def test_only_adapters_get_gradients_and_they_are_those_of_plain_autograd(first):
    reference, model, x = pair("vit", dropout=0.2)
    plain = copy.deepcopy(reference.net)
    reference.net = adapted(reference.net).base_model.model
    model = adapted(model) if first == "rewiring" else revwire.rewire(adapted(plain), x)
    found = []
    for m in (reference, model):
        torch.manual_seed(4)
        out = m(x)
        loss(out).backward()
        found.append(out)
    wanted, own = trained(reference.net), trained(model)
    assert wanted.keys() == own.keys()
    assert all("lora_" in name for name in own)
    assert_same([found[0], *(p.grad for p in wanted.values())], [found[1], *(p.grad for p in own.values())])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("first", ["LoRA", "rewiring"])
def test_adapters_are_switched_off_merged_and_taken_away(first):
    reference, model, x = pair("vit", train=False)
    plain = copy.deepcopy(reference.net)
    model = adapted(model) if first == "rewiring" else revwire.rewire(adapted(plain), x)
    model.eval()
    base, with_adapters = reference(x), model(x)
    assert not torch.allclose(base, with_adapters)
    with model.disable_adapter():
        assert_same([base], [model(x)])
    merged = copy.deepcopy(model).merge_and_unload()
    assert_same([with_adapters], [merged(x)])
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    unloaded = model.unload()
    assert_same([base], [unloaded(x)])
    for found in (merged, unloaded):
        # rewired after LoRA, the plan is on peft's wrapper, which is gone
        assert revwire.rewrite.swap.options_of(found) is not None
        revwire.unwire(found)


def test_adapters_are_saved_and_loaded(tmp_path):
    _, model, x = pair("vit", train=False)
    again = copy.deepcopy(model)
    tuned = adapted(model).eval()
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    assert_same([tuned(x)], [loaded(x)])


def test_quantised_layers_are_the_ones_that_run():
    """Weights of eight bits, LoRA beside them: gradients of the recurrence by hand over the same quantised layers."""
    reference, model, x = pair("vit")
    reference.net = adapted(reference.net).base_model.model
    model = adapted(model)
    x = x.float()
    found = []
    for m in (reference, model):
        m.float().eval()
        before = m(x)
        for part in (m.net if m is reference else m).modules():
            if isinstance(part, peft.tuners.lora.Linear):
                quantize_(part.base_layer, Int8WeightOnlyConfig(version=2), filter_fn=lambda *_: True)
        out = m(x)
        assert not torch.equal(out, before)
        loss(out).backward()
        net = reference.net if m is reference else m
        found.append([out, *(p.grad for p in trained(net).values())])
    assert len(found[0]) == 9
    assert_same(*found, tolerance=1e-5)


def test_a_quantised_model_is_rewired():
    reference, _, x = pair("vit", train=False)
    x = x.float()
    reference.float()
    before = reference(x)
    quantize_(reference.net.blocks, Int8WeightOnlyConfig(version=2))
    model = revwire.rewire(copy.deepcopy(reference.net), x)
    wanted = reference(x)
    assert not torch.equal(wanted, before)
    assert_same([wanted], [model(x)], tolerance=1e-5)
