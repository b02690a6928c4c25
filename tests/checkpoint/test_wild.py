"""Checkpoints as others left them: loaded as leniently as each library loads them, and every exception is told."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import revwire
from revwire import checkpoint
from revwire.errors import CheckpointError
from tests.helpers.checkpoints import ARGS, convert, same_bits, vit
from tests.helpers.vits import NAME

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def left(tmp_path):
    """A folder as a script of 2019 left it: a pickle, and a configuration that says neither kind nor class."""

    def save(name, config=SIZES, **more):
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**config)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        torch.save({**model.state_dict(), **more}, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model, tmp_path

    return save


def theirs(name, folder):
    torch.manual_seed(1)
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True).eval()


def ours(out):
    torch.manual_seed(1)
    return revwire.unwire(revwire.load(out)).eval()


def agree(one, other):
    """In eval mode, and in train mode with the same numbers drawn."""
    for training in (False, True):
        outputs = []
        for model in (one, other):
            torch.manual_seed(2)
            outputs.append(model.train(training)(TOKENS)[0])
        assert torch.equal(*outputs)


def there_and_back(folder, name, **options):
    done = convert(folder, **options)
    assert done.architecture.spec == f"transformers/{name}"
    before = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert same_bits(load_file(done.out), dict(before))
    agree(ours(done.out), theirs(name, folder))
    back = checkpoint.to_original(done.out)
    assert same_bits(load_file(back.out / "model.safetensors"), dict(before))
    agree(theirs(name, back.out), theirs(name, folder))
    return done


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", "BertForMaskedLM", "AlbertForMaskedLM"])
def test_the_kind_and_the_class_are_told_by_the_names(left, name):
    _, folder = left(name, {**SIZES, "embedding_size": 8} if name.startswith("Albert") else SIZES)
    assert not there_and_back(folder, name).fit.filled


def test_what_the_class_has_no_place_for_is_carried_along(left):
    pooler = {"albert.pooler.weight": torch.randn(16, 16), "albert.pooler.bias": torch.randn(16)}
    _, folder = left("AlbertForMaskedLM", {**SIZES, "embedding_size": 8}, **pooler)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["AlbertForMaskedLM"]}))
    done = there_and_back(folder, "AlbertForMaskedLM")
    assert done.fit.carried == {"albert.pooler.weight": "16x16", "albert.pooler.bias": "16"}
    assert done.to_dict()["fit"]["carried"] == dict(done.fit.carried)
    assert "carried along, with no place in the model: albert.pooler.weight (16x16)" in str(done)


@pytest.mark.filterwarnings("ignore:.*start from random numbers")
def test_a_head_that_is_missing_is_filled_and_told(left):
    _, folder = left("BertModel")
    done = convert(folder, arch="transformers/BertForSequenceClassification")
    assert done.fit.filled == {"classifier.weight": "2x16", "classifier.bias": "2"}
    assert "NOT in the file" in str(done)
    assert done.fit.renamed["bert.pooler.dense.weight"] == "pooler.dense.weight"
    agree(ours(done.out), theirs("BertForSequenceClassification", folder))
    with pytest.warns(UserWarning, match=r"does not have classifier.*start from random numbers"):
        checkpoint.load(done.out)


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.bias", "embeddings.word_embeddings.weight"])
def test_a_trunk_that_is_missing_is_an_error(left, lost):
    model, folder = left("BertModel")
    torch.save({k: v for k, v in model.state_dict().items() if k != lost}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"missing: {lost} \("):
        convert(folder)


def test_layers_that_are_left_over_are_an_error(left):
    _, folder = left("BertModel", SIZES, **{"encoder.layer.7.output.dense.bias": torch.ones(16)})
    with pytest.raises(
        CheckpointError, match=r"not in the architecture: encoder.layer.7.output.dense.bias \(16\)"
    ):
        convert(folder)


def test_names_that_are_those_of_two_kinds_are_asked_about(left):
    _, folder = left("RobertaModel", {**SIZES, "type_vocab_size": 1})
    with pytest.raises(CheckpointError, match="both BERT's and RoBERTa's"):
        convert(folder)
    assert (
        convert(folder, arch="transformers/RobertaModel").architecture.model_args["model_type"] == "roberta"
    )


def test_a_class_without_a_configuration_is_not_guessed(left):
    _, folder = left("BertModel")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json lies beside"):
        convert(folder, arch="transformers/BertModel")


def test_quantised_weights_are_no_weights(left):
    state = left("BertModel")[0].state_dict()
    folder = left("BertModel", SIZES, **{"pooler.dense.weight_scale_inv": torch.ones(1)})[1]
    assert state
    with pytest.raises(CheckpointError, match=r"quantised weights \(pooler\.dense\.weight_scale_inv"):
        convert(folder)


# --- layouts of others, of ViTs ---


def filtered(state):
    """What timm's own loading makes of a state dict in another layout."""
    overlay = {"state_dict": dict(state), "num_classes": ARGS["num_classes"], "custom_load": False}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **ARGS)


def as_dinov2(state):
    return {**state, "mask_token": torch.randn(1, 48)}


def as_clip(state):
    """OpenAI's and open_clip's, with a text tower that is none of ours."""
    pairs = (
        ("blocks.", "transformer.resblocks."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("norm.", "ln_post."),
        ("patch_embed.proj", "conv1"),
    )
    made = {"token_embedding.weight": torch.randn(5, 8), "logit_scale": torch.ones(())}
    for name, tensor in state.items():
        value = tensor
        if name == "cls_token":
            name, value = "class_embedding", tensor[0, 0].clone()
        elif name == "pos_embed":
            name, value = "positional_embedding", tensor[0].clone()
        elif name == "head.weight":
            name, value = "proj", tensor.T.contiguous()
        elif name == "head.bias":
            continue
        for old, new in pairs:
            name = name.replace(old, new)
        made[f"visual.{name}"] = value
    return made


@pytest.mark.parametrize(("layout", "carried"), [(as_dinov2, "mask_token"), (as_clip, "logit_scale")])
def test_other_layouts_through_the_filter_of_timm(tmp_path, layout, carried):
    state = layout(vit().state_dict())
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    done = convert(path, arch=NAME, model_args=ARGS)
    assert carried in done.fit.carried
    assert same_bits(load_file(done.out), state)
    images = torch.randn(2, 3, 32, 32)
    reference = filtered(state)
    for training in (False, True):
        assert torch.equal(ours(done.out).train(training)(images), reference.train(training)(images))
    back = checkpoint.to_original(done.out)
    assert same_bits(load_file(back.out), state)


def test_a_layout_of_others_is_known_by_its_names(tmp_path):
    model = timm.create_model("test_vit", num_classes=3).eval()
    path = tmp_path / "dinov2.pth"
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 64)}, path)
    done = convert(path)
    assert (done.architecture.name, done.architecture.model_args) == ("test_vit", {"num_classes": 3})
    assert done.fit.carried == {"mask_token": "1x64"}
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(ours(done.out)(images), model(images))


def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path):
    state = as_dinov2(vit(img_size=64).state_dict())
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    done = convert(path, arch=NAME, model_args=ARGS)
    assert done.fit.renamed == {"pos_embed": "pos_embed (1x17x48), as 1x5x48"}
    assert same_bits(dict(ours(done.out).state_dict()), dict(filtered(state).state_dict()))


def test_an_encoder_of_mae_has_no_head(tmp_path):
    state = vit(num_classes=0).state_dict()
    path = tmp_path / "mae.pth"
    torch.save({"model": state, "epoch": 3}, path)
    done = convert(path, arch=NAME, model_args={**ARGS, "num_classes": 0})
    assert (done.entry, done.fit.plain) == ("model", True)


# --- formats of numbers, folders of trainers ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_numbers(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in vit().state_dict().items()}
    path = tmp_path / "narrow.safetensors"
    save_file(state, path)
    done = convert(path, arch=NAME, model_args=ARGS)
    assert same_bits(load_file(done.out), state)
    loaded = checkpoint.load(done.out).state_dict()
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in state.items())


def test_a_folder_of_deepspeed(tmp_path):
    state = vit().state_dict()
    inside = tmp_path / "global_step7"
    inside.mkdir()
    (tmp_path / "latest").write_text("global_step7")
    torch.save({"module": state, "ds_version": "0", "optimizer": None}, inside / "mp_rank_00_model_states.pt")
    done = convert(tmp_path, arch=NAME, model_args=ARGS)
    assert same_bits(load_file(done.out), dict(state))
    (inside / "zero_pp_rank_1_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        convert(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        convert(tmp_path)


def test_the_base_of_an_adapter_is_named(tmp_path):
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/bert"}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"its base model \(someone/bert, says adapter_config"):
            convert(path)
