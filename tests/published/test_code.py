"""The code of the documents runs.

Every python block of every page is executed, a page's blocks from top to bottom in one namespace; a new page and a new
block are covered as they are written. Nothing is skipped: what cannot be had in a test is replaced, in `stand_ins`.
"""

import json
import socket

import pytest
import timm
import torch
import transformers
import yaml

from tests.helpers.documents import PAGES, blocks, fences

# what a page has to print, where it says so
PRINTED = {
    "README.md": ["4 steps in 1 chain", "fits 24 GiB"],
    "index.md": ["4 steps in 1 chain", "fits 2 GiB"],
    "memory.md": ["autocast bfloat16", "fits 24 GiB"],
    "own-models.md": ["12 steps in 1 chain"],
    "integrations.md": ["torch.Size([8, 17, 48])", "Total params"],
}
# torch's own: what it deprecates and calls, and one process with itself on the CPU
WARNED = {
    "memory.md": ["ignore:.*CUDA is not available"],
    "integrations.md": [
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:The .grad attribute of a Tensor:UserWarning",
    ],
}


@pytest.fixture
def stand_ins(monkeypatch):
    """No connection is made and no GPU asked: weights are random ones; and timm's ViTs have two blocks, for speed."""
    create, built = timm.create_model, timm.models.is_model_pretrained

    def untrained(name, *args, pretrained=False, **kwargs):
        assert not pretrained or built(name), f"timm has no weights for {name}"
        few = {"depth": 2, **kwargs} if name.startswith("vit_") else kwargs
        return create(name, *args, **few)

    def from_pretrained(name):
        assert name == "facebook/dinov2-base", f"say here what stands in for {name}"
        torch.manual_seed(0)
        small = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 32}
        return transformers.Dinov2Model(transformers.Dinov2Config(image_size=224, **small))

    def offline(*_):
        raise AssertionError("a document's code loads something: say in stand_ins what takes its place")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda model, sample: model)
    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(socket.socket, "connect", offline)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.filterwarnings(w) for w in WARNED.get(p.name, [])])
        for p in PAGES
        if blocks(p)
    ],
)
def test_code_blocks_run(path, capsys, monkeypatch, tmp_path, stand_ins):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    for index, code in enumerate(blocks(path)):
        exec(compile(code, f"{path.name}, block {index + 1}", "exec"), namespace)
    printed = capsys.readouterr().out
    for text in PRINTED.get(path.name, []):
        assert text in printed


def test_yaml_and_json_blocks_can_be_read():
    for path in PAGES:
        for language, code in fences(path.read_text("utf-8")):
            if language in {"yaml", "json"}:
                (yaml.safe_load if language == "yaml" else json.loads)(code)
