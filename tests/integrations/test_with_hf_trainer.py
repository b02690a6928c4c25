"""Hugging Face's Trainer on a transformers model: stop and go on, gradient checkpointing, what a checkpoint holds."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import revwire
from tests.helpers.pictures import CLASSES, SIZE, Pictures, assert_close
from tests.helpers.steps import kept

# transformers pins no memory where there is no accelerator, and torch says so
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


class Labelled(Dataset):
    def __init__(self, count=16):
        self.pictures = Pictures(count)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture, label = self.pictures[index]
        return {"pixel_values": picture.float(), "labels": label}


class Noting(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def classifier(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=24,
        hidden_dropout_prob=0.1,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def pyramid(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [2, 3, 1, 1], "image_size": SIZE, "patch_size": 2}
    return ConvNextV2ForImageClassification(ConvNextV2Config(**sizes, drop_path_rate=0.1, num_labels=CLASSES))


def rewired(make=classifier, seed=0):
    return revwire.rewire(make(seed), {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)})


def train(model, folder, steps=6, resume=None, **options):
    """The losses, step by step; a checkpoint after each third one."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        seed=3,
        **options,
    )
    noting = Noting()
    trainer = Trainer(model=model, args=arguments, train_dataset=Labelled(), callbacks=[noting])
    trainer.train(resume_from_checkpoint=resume)
    return noting.losses


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Of a ConvNeXt: transformers 5.23 writes a ViT under other names than its Trainer reads, rewired or not."""
    whole = train(rewired(pyramid), tmp_path / "whole")
    last = str(tmp_path / "whole" / "checkpoint-3")
    rest = train(rewired(pyramid, seed=1), tmp_path / "other", resume=last)
    assert rest == whole[3:]
    assert_close(train(kept(rewired(pyramid)), tmp_path / "kept"), whole, 1e-4)


def test_what_the_checkpoint_holds_is_the_model_as_it_was(tmp_path):
    """`from_pretrained` reads it; rewired again, it is the network that was trained."""
    model = rewired()
    train(model, tmp_path, 3)
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3").eval()
    x = Labelled(2)[1]["pixel_values"][None]
    with torch.no_grad():
        wanted = model.eval()(x).logits
        original = loaded(x).logits
        found = revwire.rewire(loaded, {"pixel_values": x})(x).logits
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(original, wanted, atol=1e-2)


def test_a_checkpoint_is_rewired_as_it_was_trained(tmp_path):
    model = revwire.rewire(classifier(), {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}, coupling="bdia")
    train(model, tmp_path, 3)
    loaded = revwire.rewire(ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3"))
    assert revwire.plan_of(loaded) == revwire.plan_of(model)
    x = Labelled(2)[1]["pixel_values"][None]
    torch.testing.assert_close(loaded.eval()(x).logits, model.eval()(x).logits)


# a rewired model's methods are not those of its base class, which transformers takes for an override of the old name
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_of_rewired_blocks(tmp_path):
    """Of no use, and right: each block of a chain is checkpointed, its input a pair of streams."""
    plain = train(kept(rewired()), tmp_path / "plain", 3)
    found = train(rewired(), tmp_path / "checkpointed", 3, activation_checkpointing=True)
    assert_close(plain, found, 1e-4)
