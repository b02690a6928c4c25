"""Files of each layout, made by rules of renaming that are written from their side: theirs, not ours."""

import re

import torch
from safetensors.torch import save_file

from examples.re2tal.backbones.build import build_backbone

SWIN = ("swin3d_t", {"embed_dim": 8, "depths": [1, 2, 2], "num_heads": [1, 2, 2], "window_size": [4, 2, 3]})
SLOWFAST = ("slowfast_r50", {"depths": [3, 1, 2, 2], "base": 8, "fast": 1})
VIDEOMAE = (
    "videomae_b",
    {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "size": 32,
    },
)


def renamed(tensors, rules):
    """Each name by the first rule that fits it."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            new, found = re.subn(f"^{pattern}$", replacement, name)
            if found:
                out[new] = tensor
                break
        else:
            raise AssertionError(name)
    return out


def swin_rules(last="norm2", inverted=False):
    half = {"norm1": "Fm", "attn": "Fm", "norm2": "Gm", "mlp": "Gm"} if inverted else {}
    rules = [(r"patch_embed\.(.*)", r"patch_embed.\1"), (r"norm\.(.*)", rf"{last}.\1")]
    for stage in range(3):
        rules.append((rf"features\.{2 * stage + 1}\.(.*)", rf"layers.{stage}.downsample.\1"))
        for layer, theirs in (
            ("norm1", "norm1"),
            ("attn", "attn"),
            ("norm2", "norm2"),
            (r"mlp\.0", "mlp.fc1"),
            (r"mlp\.3", "mlp.fc2"),
        ):
            block = f"inv_block.{half[theirs.partition('.')[0]]}." if inverted else ""
            rules.append(
                (
                    rf"features\.{2 * stage}\.(\d+)\.{layer}\.(.*)",
                    rf"layers.{stage}.blocks.\1.{block}{theirs}.\2",
                )
            )
    return rules


def slowfast_rules(inverted=False):
    rules = []
    for p, path in ((0, "slow_path"), (1, "fast_path")):
        rules.append((rf"blocks\.0\.multipathway_blocks\.{p}\.conv\.weight", rf"{path}.conv1.conv.weight"))
        rules.append((rf"blocks\.0\.multipathway_blocks\.{p}\.norm\.(.*)", rf"{path}.conv1.bn.\1"))
        for s in range(1, 5):
            ours = rf"blocks\.{s}\.multipathway_blocks\.{p}\.res_blocks"
            first, later = ("blocks.0.Fm", r"blocks.\1.inv_block.Fm") if inverted else ("0", r"\1")
            skip = "blocks.0" if inverted else "0"
            rules.append(
                (rf"{ours}\.0\.branch1_conv\.weight", rf"{path}.layer{s}.{skip}.downsample.conv.weight")
            )
            rules.append((rf"{ours}\.0\.branch1_norm\.(.*)", rf"{path}.layer{s}.{skip}.downsample.bn.\1"))
            for n, letter in enumerate("abc", 1):
                rules.append(
                    (
                        rf"{ours}\.0\.branch2\.conv_{letter}\.weight",
                        rf"{path}.layer{s}.{first}.conv{n}.conv.weight",
                    )
                )
                rules.append(
                    (rf"{ours}\.0\.branch2\.norm_{letter}\.(.*)", rf"{path}.layer{s}.{first}.conv{n}.bn.\1")
                )
                rules.append(
                    (
                        rf"{ours}\.(\d+)\.branch2\.conv_{letter}\.weight",
                        rf"{path}.layer{s}.{later}.conv{n}.conv.weight",
                    )
                )
                rules.append(
                    (
                        rf"{ours}\.(\d+)\.branch2\.norm_{letter}\.(.*)",
                        rf"{path}.layer{s}.{later}.conv{n}.bn.\2",
                    )
                )
    lateral = r"multipathway_fusion\.conv_fast_to_slow\.weight"
    rules.append((rf"blocks\.0\.{lateral}", "slow_path.conv1_lateral.conv.weight"))
    rules.append((rf"blocks\.(\d)\.{lateral}", r"slow_path.layer\1_lateral.conv.weight"))
    return rules


def videomae_file(
    backbone, patches="patch_embed.projection", mlp=("mlp.layers.0.0", "mlp.layers.1"), norm="fc_norm"
):
    """Query, key and value in one, as in timm; the last norm is the classifier's if it is `fc_norm`."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()}
    out = {}
    for name in [n for n in tensors if ".query.weight" in n]:
        block = re.search(r"\d+", name)[0]
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        out[f"blocks.{block}.attn.qkv.weight"] = torch.cat(parts)
    rules = [
        (r"embeddings\.patch_embeddings\.projection\.(.*)", rf"{patches}.\1"),
        (r"encoder\.layer\.(\d+)\.layernorm_before\.(.*)", r"blocks.\1.norm1.\2"),
        (r"encoder\.layer\.(\d+)\.layernorm_after\.(.*)", r"blocks.\1.norm2.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.bias", r"blocks.\1.attn.q_bias"),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.bias", r"blocks.\1.attn.v_bias"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", rf"blocks.\1.{mlp[0]}.\2"),
        (r"encoder\.layer\.(\d+)\.output\.dense\.(.*)", rf"blocks.\1.{mlp[1]}.\2"),
        (r"layernorm\.(.*)", rf"{norm}.\1"),
    ]
    table = backbone.model.embeddings.position_embeddings.clone()
    return {**out, **renamed(tensors, rules), "pos_embed": table}


def shaken(name, options, **more):
    """A backbone no two of whose tensors are alike."""
    torch.manual_seed(1)
    backbone = build_backbone(name, **options, **more)
    for name, parameter in backbone.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:  # norms that are all ones, and branches that begin as zero, hide mistakes
            torch.nn.init.uniform_(parameter, 0.5, 1.0) if name.endswith("weight") else torch.nn.init.normal_(
                parameter
            )
    for name, buffer in backbone.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return backbone


def swin(**rules):
    return shaken(*SWIN), lambda b: renamed(b.state_dict(), swin_rules(**rules))


def slowfast(wiring, **rules):
    return shaken(*SLOWFAST, wiring=wiring), lambda b: renamed(b.state_dict(), slowfast_rules(**rules))


def videomae(mean_pooling=True, **names):
    norm = "fc_norm" if mean_pooling else "norm"
    backbone = shaken(*VIDEOMAE, use_mean_pooling=mean_pooling)
    return backbone, lambda b: {**videomae_file(b, norm=norm, **names), "fc_norm.weight": torch.ones(12)}


def own(made):
    return made, lambda b: dict(b.state_dict())


def transformers(old=False):
    """The file of a classifier of the hub."""
    biases = {"query.bias": "q_bias", "value.bias": "v_bias"} if old else {}

    def theirs(name):
        for ours, new in biases.items():
            name = name.replace(ours, new)
        return name.replace("model.", "videomae.")

    return shaken(*VIDEOMAE), lambda b: {theirs(name): tensor for name, tensor in b.state_dict().items()}


CASES = {
    "mmaction2 Video Swin": (SWIN, "backbone.", swin),
    "Video Swin of its own repository": (SWIN, "backbone.", lambda: swin(last="norm")),
    "rewired Video Swin": (SWIN, "backbone.", lambda: swin(inverted=True)),
    "Video Swin in a detector": (SWIN, "module.backbone.model.backbone.", lambda: swin(inverted=True)),
    "torchvision Video Swin": (SWIN, "", lambda: own(shaken(*SWIN))),
    "mmaction2 SlowFast": (SLOWFAST, "backbone.", lambda: slowfast("mmaction2")),
    "rewired SlowFast": (SLOWFAST, "backbone.", lambda: slowfast("re2tal", inverted=True)),
    "SlowFast in a detector": (SLOWFAST, "module.backbone.model.backbone.", lambda: slowfast("re2tal", inverted=True)),
    "pytorchvideo SlowFast": (SLOWFAST, "", lambda: own(shaken(*SLOWFAST))),
    "mmaction2 VideoMAE": (VIDEOMAE, "backbone.", videomae),
    "mmaction2 VideoMAE with a norm": (VIDEOMAE, "backbone.", lambda: videomae(mean_pooling=False)),
    "VideoMAE of its own repository": (
        VIDEOMAE, "module.", lambda: videomae(patches="patch_embed.proj", mlp=("mlp.fc1", "mlp.fc2"))
    ),
    "transformers VideoMAE": (VIDEOMAE, "", transformers),
    "VideoMAE of transformers before 5": (VIDEOMAE, "", lambda: transformers(old=True)),
}  # fmt: skip
BESIDE = {
    "": {
        "head.weight": torch.zeros(6, 8),
        "blocks.6.proj.weight": torch.zeros(2),
        "classifier.bias": torch.zeros(6),
    },
    "backbone.": {"cls_head.fc_cls.weight": torch.zeros(6, 8), "cls_head.fc_cls.bias": torch.zeros(6)},
    "module.": {"module.head.weight": torch.zeros(6, 12)},
    "module.backbone.model.backbone.": {
        "module.projection.x": torch.zeros(3),
        "module.rpn_head.y": torch.zeros(1),
    },
}
ALLOWED = {  # what of those a family's files may hold
    "swin3d_t": ("head.", "cls_head.", "module.projection", "module.rpn_head"),
    "slowfast_r50": ("blocks.6", "cls_head.", "module.projection", "module.rpn_head"),
    "videomae_b": ("head.", "cls_head.", "module.", "classifier."),
}


def stored(case, path):
    """The network, and its file with what lies beside it."""
    (name, _), prefix, make = CASES[case]
    backbone, theirs = make()
    tensors = {prefix + key: tensor.clone().contiguous() for key, tensor in theirs(backbone).items()}
    beside = {key: tensor for key, tensor in BESIDE[prefix].items() if key.startswith(ALLOWED[name])}
    save_file({**tensors, **beside}, path)
    return backbone, tensors
