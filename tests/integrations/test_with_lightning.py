"""Lightning's Trainer: a run that stops and goes on is the run that does not stop; its losses are plain autograd's."""

import warnings

import lightning
import pytest
import torch
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils.data import DataLoader

from tests.helpers.pictures import Pictures, assert_close, rewired, vit
from tests.helpers.steps import kept

# advice of Lightning's about workers, and what it calls of torch's
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.losses = model, []
        self.example_input_array = Pictures(2).pictures

    def forward(self, pictures):
        return self.model(pictures.to(next(self.model.parameters()).dtype))

    def on_train_batch_start(self, batch, index):
        torch.manual_seed(100 * self.current_epoch + index)  # checkpoints of Lightning hold no random state

    def training_step(self, batch, index):
        pictures, labels = batch
        loss = F.cross_entropy(self(pictures), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(model, folder, epochs, checkpoint=None, **options):
    """The losses; a checkpoint stays in the folder."""
    module = Classifier(model)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(Pictures(), 4), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "stopped.ckpt")
    return module.losses


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = fit(rewired(), tmp_path, 2, accumulate_grad_batches=2)
    first = fit(rewired(), tmp_path, 1, accumulate_grad_batches=2)
    rest = fit(rewired(seed=1), tmp_path, 2, tmp_path / "stopped.ckpt", accumulate_grad_batches=2)
    assert first + rest == whole
    assert_close(fit(kept(rewired()), tmp_path, 2, accumulate_grad_batches=2), whole)


def test_a_rewired_checkpoint_is_one_of_the_original_model(tmp_path):
    """No key tells them apart."""
    fit(rewired(), tmp_path, 1)
    state = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    module = Classifier(vit(seed=1))
    module.load_state_dict(state, strict=True)


def test_a_checkpoint_tells_a_model_that_is_rewired_another_way(tmp_path):
    fit(rewired(coupling="bdia"), tmp_path, 1)
    state = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Classifier(rewired(seed=1, coupling="bdia")).load_state_dict(state)
    with pytest.warns(UserWarning, match=r"rewired by coupling='bdia.*another function"):
        Classifier(rewired(seed=1)).load_state_dict(state)


def test_bf16_mixed_precision(tmp_path):
    """As near to plain autograd under the same autocast as bfloat16 lets two runs be."""
    found = fit(rewired().float(), tmp_path, 1, precision="bf16-mixed")
    assert_close(fit(kept(rewired().float()), tmp_path, 1, precision="bf16-mixed"), found, 2e-2)


def test_the_summary_of_a_model_with_chains():
    """Lightning's reads sizes by hooks, and takes what travels between blocks for a tensor."""
    wanted, found = (str(ModelSummary(Classifier(model), max_depth=3)) for model in (vit(), rewired()))
    assert wanted == found
    assert "[2, 5, 12]" in found
