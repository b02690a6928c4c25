"""Which class of transformers a checkpoint is of, where its `config.json` does not say: told by the tensors' names.

A configuration written before 2020 has no `model_type`; many have no `architectures`. The kinds of model of that time
are known by their names; the class is the one among a kind's classes that lacks nothing and leaves the least over.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from revwire.errors import RevwireError
from revwire.libraries.transformers_config import LIBRARY, check_counts, model_class
from revwire.libraries.transformers_fit import create

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

# What the names of one kind of model hold and those of no kind before it. RoBERTa's encoder alone has the names of
# BERT's, and counts its positions from another place.
_KINDS = (
    ("albert", r"(^|\.)albert_layer_groups\.0\."),
    ("roberta", r"^roberta\.encoder\.layer\.0\."),
    ("bert", r"^bert\.encoder\.layer\.0\.attention\.self\."),
    ("distilbert", r"^(distilbert\.)?transformer\.layer\.0\.attention\.q_lin\."),
    ("xlnet", r"^(transformer\.)?layer\.0\.rel_attn\.q$"),
    ("xlm", r"^(transformer\.)?attentions\.0\.q_lin\."),
    ("ctrl", r"^(transformer\.)?h\.0\.multi_head_attention\.Wq\."),
    ("openai-gpt", r"^(transformer\.)?tokens_embed\."),
    ("gpt2", r"^(transformer\.)?h\.0\.attn\.c_attn\."),
    ("t5", r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.q\."),
)
_BERT_ALONE = re.compile(r"^encoder\.layer\.0\.attention\.self\.query\.")
_OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))


def is_old(config: Mapping[str, Any]) -> bool:
    """Whether a configuration without a `model_type` is one of transformers: it counts words, layers and heads."""
    return "vocab_size" in config and any(
        key in config for key in ("num_hidden_layers", "n_layer", "n_layers")
    )


def kind_of(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """The `model_type` of a checkpoint whose configuration has none.

    Args:
        config: The configuration.
        names: Of the tensors.

    Raises:
        RevwireError: The names are those of no kind, or of two.
    """
    names = list(names)
    for kind, pattern in _KINDS:
        if any(map(re.compile(pattern).search, names)):
            return kind
    if any(map(_BERT_ALONE.search, names)):
        types = config.get("type_vocab_size")
        if isinstance(types, int) and types > 1:
            return "bert"  # RoBERTa has one kind of token
        raise RevwireError(
            "it has no model_type, and the names of the tensors are both BERT's and RoBERTa's: choose by --arch "
            f"(arch=), {LIBRARY}/BertModel or {LIBRARY}/RobertaModel"
        )
    raise RevwireError(
        f"it has no model_type, and the names of the tensors are those of no kind of model that was written without: "
        f"add it, or name the class by --arch (arch=), such as {LIBRARY}/BertModel"
    )


def class_of(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The class that a configuration and the names and shapes of the tensors fit best.

    Args:
        kind: The `model_type`.
        config: The configuration.
        tensors: The state dict.

    Raises:
        RevwireError: Two classes fit alike and differ in what they compute, or there is none.
    """
    check_counts(config, len(tensors))
    found: dict[tuple[int, int], list[str]] = {}
    for name in _classes(kind):
        if (rank := _rank(name, {**config, "model_type": kind}, tensors)) is not None:
            found.setdefault(rank, []).append(name)
    if not found:
        raise RevwireError(f"it names no architectures, and model_type {kind!r} has no model of its own")
    best = found[min(found)]
    if len(best) > 1 and not config.get("is_decoder"):
        # the same tensors once more, for generating
        best = [name for name in best if not name.endswith(("LMHeadModel", "ForCausalLM"))] or best
    if len(best) > 1:
        raise RevwireError(
            f"it names no architectures, and the tensors are those of {' and of '.join(best)}: choose by --arch "
            f"(arch=), {LIBRARY}/{best[0]}"
        )
    return best[0]


def _classes(kind: str) -> list[str]:
    """The classes of a kind, as transformers lists them by task; the model without a head first."""
    from transformers.models.auto import modeling_auto

    lists = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    lists.sort(key=lambda each: each is not modeling_auto.MODEL_MAPPING_NAMES)
    found: list[str] = []
    for each in lists:
        named = each.get(kind, ())
        found += [named] if isinstance(named, str) else list(named)
    return [name for name in dict.fromkeys(found) if model_class(name) is not None]


def _rank(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """How many tensors of a class are missing, and how many are left over; None where it cannot be built."""
    try:
        with torch.device("meta"):
            outline = create(name, config)
    except RevwireError:
        return None
    prefix = f"{getattr(outline, 'base_model_prefix', '')}."
    wanted = _shapes(outline, prefix)
    there = {_plain(each, prefix): tuple(tensor.shape) for each, tensor in tensors.items()}
    groups: dict[int, list[str]] = {}
    for each, parameter in outline.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(_plain(each, prefix))
    missing = sum(not any(there.get(each) == wanted[each] for each in tied) for tied in groups.values())
    return missing, sum(wanted.get(each) != shape for each, shape in there.items())


def _shapes(outline: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        _plain(name, prefix): tuple(tensor.shape)
        for name, tensor in outline.state_dict(keep_vars=True).items()
    }


def _plain(name: str, prefix: str) -> str:
    """A name without the prefix of the model under a head, and as it is called today."""
    name = name.removeprefix(prefix)
    for old, new in _OLD_NAMES:
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name
