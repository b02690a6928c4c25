"""What a user does in Python, run where the wheel is installed and this checkout is not."""

import sys
from pathlib import Path

import timm
import torch

import revwire

assert "site-packages" in revwire.__file__, revwire.__file__


def step(model, inputs):
    """Outputs and gradients of a training step."""
    model.zero_grad()
    out = model(inputs)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, inputs, dials):
    """Gradients of a rewired model's step are those with everything kept."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = step(revwire.rewire(model, inputs, **dials), inputs)
    model.load_state_dict(before)  # statistics of norms went on
    wanted = step(revwire.rewire(revwire.unwire(model), inputs, **{**dials, "keep": "*"}), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    revwire.unwire(model)


def main():
    """Plan, rewire, train, a budget, save, load."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).double()
    compare(vit, images, {})
    compare(vit, images, {"coupling": "dr2net(alpha=0.9,beta=0.5)", "exact": True})
    compare(timm.create_model("resnet18", num_classes=5).double(), images, {})

    rewired = revwire.rewire(vit.float(), images.float(), budget="1GiB")
    optimizer = torch.optim.AdamW(rewired.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        rewired(images.float()).square().mean().backward()
        optimizer.step()
    args = {"img_size": 64, "num_classes": 5}
    revwire.save(rewired, "own.safetensors", arch="vit_tiny_patch16_224", model_args=args)
    loaded = revwire.load("own.safetensors").eval()
    torch.testing.assert_close(loaded(images.float()), rewired.eval()(images.float()))

    for optional in sys.argv[1:]:
        {"transformers": transformers_model, "torchvision": torchvision_model}[optional]()


def transformers_model():
    """A model of transformers, and a folder as it is saved, for `revwire convert`."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).train()
    model.save_pretrained("hf")
    revwire.rewire(model, torch.randn(2, 3, 32, 32))
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()


def torchvision_model():
    """A model of torchvision, and its own file."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=4).double()
    torch.save(model.state_dict(), "resnet18.pth")
    compare(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), {})


if __name__ == "__main__":
    here = Path.cwd()
    assert not (here / "revwire").exists()
    main()
