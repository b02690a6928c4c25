"""Hugging Face models: their chains, verified; features, attention maps and generation with a cache; post-norm."""

import warnings

import pytest
import torch

import revwire
from benchmarks.shared.small_transformers import ZOO
from tests.helpers.nets import stir
from tests.helpers.steps import kept

pytestmark = pytest.mark.slow

# the whole list is verified by benchmarks/coverage.py; here one of each kind of frame
SAMPLE = ["bert", "t5", "gpt2", "swin", "dinov3_vit", "timesformer", "wav2vec2"]
GENERATING = ["gpt2", "llama", "qwen3", "t5", "whisper"]


def build(name, seed=0):
    make, inputs, steps = ZOO[name]
    torch.manual_seed(seed)
    return make(), inputs(2), steps


@pytest.mark.parametrize("name", ZOO)
def test_all_blocks_are_in_chains(name):
    model, inputs, steps = build(name)
    assert tuple(len(chain.steps) for chain in revwire.plan(model, inputs).chains) == steps


@pytest.mark.parametrize("name", SAMPLE)
def test_verified(name):
    model, inputs, _ = build(name)
    report = revwire.verify(stir(model, 0.8), inputs)
    assert report.ok, report.to_dict()


def test_post_norm_moves_into_the_branch():
    model, inputs, _ = build("bert")
    stir(model, 0.8).eval()
    layers = model.encoder.layer
    trunk, mask = [], {}

    def catch(_, args, kwargs):
        trunk.append(args[0])
        mask["mask"] = args[1] if len(args) > 1 else kwargs.get("attention_mask")

    with layers[0].register_forward_pre_hook(catch, with_kwargs=True):
        model(**inputs)

    def attention(layer, x):
        return layer.attention.output.LayerNorm(
            layer.attention.output.dense(layer.attention.self(x, mask["mask"])[0])
        )

    def feed_forward(layer, x):
        return layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)))

    previous = current = trunk[0]
    for layer in layers:
        for branch in (attention, feed_forward):
            previous, current = current, previous + branch(layer, current)
    found = revwire.rewire(model, inputs)(**inputs).last_hidden_state
    torch.testing.assert_close(found, (previous + current) / 2)
    assert {step.post for step in revwire.plan_of(model).steps} == {"output.LayerNorm"}


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_hidden_states_and_attention_maps_are_the_merged_trunk_s(name):
    model, inputs, _ = build(name)
    stir(model, 0.8).eval()
    model.config._attn_implementation = "eager"
    revwire.rewire(model, inputs)
    trunk = []
    blocks = [m for m in model.modules() if type(m).__name__ in {"ViTLayer", "BertLayer", "GPT2Block"}]
    for block in blocks[:-1]:
        block.register_forward_hook(
            lambda _, args, out: trunk.append(out if not isinstance(out, tuple) else out[0])
        )
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(blocks) + 1
    assert len(out.attentions) == len(blocks)
    assert all(type(t) is torch.Tensor for t in (*out.hidden_states, *out.attentions))
    for found, wanted in zip(out.hidden_states[1:-1], trunk, strict=True):
        torch.testing.assert_close(found, wanted.tensor())
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    plain = model(**inputs)
    torch.testing.assert_close(plain[0], out[0])


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_is_generation_without(name):
    model, inputs, _ = build(name)
    if name == "whisper":
        from transformers import WhisperForConditionalGeneration

        model = WhisperForConditionalGeneration(model.config)
    stir(model, 0.8).eval()
    inputs = {key: value for key, value in inputs.items() if key != "use_cache"}
    revwire.rewire(model, inputs)
    prompt = {key: value[:1] for key, value in inputs.items() if key in {"input_ids", "input_features"}}
    texts, scores = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs the original forward.*")
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
        for use_cache in (True, False):
            made = model.generate(
                **prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            texts.append(made.sequences)
            scores.append(torch.stack(made.logits))
    assert torch.equal(*texts)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_cache_filled_while_training_is_filled_again_in_the_second_run(name):
    model, inputs, _ = build(name)
    inputs["use_cache"] = True
    revwire.rewire(stir(model, 0.8).double(), inputs)
    gradients = []
    for net in (kept(model).train(), model.train()):
        torch.manual_seed(1)
        out = net(**inputs)
        layers = getattr(out.past_key_values, "self_attention_cache", out.past_key_values).layers
        (out.logits.square().mean() + sum(layer.keys.square().mean() for layer in layers)).backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for plain, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-9, atol=1e-12)


def test_the_callers_cache_is_untouched_by_planning():
    from transformers import DynamicCache

    model, inputs, _ = build("llama")
    cache = DynamicCache(config=model.config)
    revwire.plan(model, {**inputs, "use_cache": True, "past_key_values": cache})
    assert cache.get_seq_length() == 0
    wanted = model.eval()(**{**inputs, "use_cache": True, "past_key_values": cache}).logits
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    torch.testing.assert_close(wanted, model(**inputs).logits)
