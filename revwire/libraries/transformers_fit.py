"""Models of Hugging Face transformers, built from a configuration and filled as `from_pretrained` does.

It renames, leaves aside and fills without an error. Here that is found out on tensors of one number each, and told;
what is missing in, or left over from, the layers of the trunk is an error all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.libraries.comparison import faults, shape_of, sizes
from revwire.libraries.fit import Fit
from revwire.libraries.transformers_config import alone, check_counts, parts, unbuildable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from revwire.libraries.interface import Architecture

_SLACK = 2**24  # parameters that a file may lack before the model is not even built to tell which


def create(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build a model of transformers with random weights, without touching a network or a file.

    Args:
        name: The class.
        model_args: The configuration, as `config.json` has it.

    Returns:
        The model in train mode.

    Raises:
        RevwireError: transformers has no such class, or it refuses the configuration.
    """
    kind, configuration = parts(name, model_args)
    with alone():
        try:
            model: nn.Module = kind._from_config(configuration)  # noqa: SLF001 - what AutoModel.from_config calls
        except Exception as error:  # a configuration of other types fails in every way
            raise unbuildable(name, error) from error
    return model.train()


def fit(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Fit:
    """How `from_pretrained` puts a state dict into the model.

    What is tied to a tensor that is there may be missing, and so may buffers of indexes, which are constants.

    Args:
        architecture: The class and its configuration.
        tensors: The state dict.

    Raises:
        RevwireError: The model cannot be built.
    """
    check_counts(architecture.model_args, len(tensors))
    with torch.device("meta"):
        # where from_pretrained builds it too: what can't be built there is not built at all
        outline = create(architecture.name, architecture.model_args)
    wanted = sum(parameter.numel() for parameter in outline.parameters())
    there = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * there + _SLACK:  # what is missing would be allocated, to find out its name
        return Fit(faults=f"its configuration describes {wanted} numbers, and {there} are there")
    model, info = _pretrained(architecture, _numbered(tensors), torch.float32, ignore_mismatched_sizes=True)
    state = model.state_dict()
    constants = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    filled = {
        name: shape_of(state[name])
        for name in sorted(info["missing_keys"])
        if name in state and name not in constants
    }
    other = {
        name: f"found {sizes(found)}, wanted {sizes(size)}" for name, found, size in info["mismatched_keys"]
    }
    other.update(
        (name, f"found {shape_of(tensor)}, wanted {shape_of(state[name])}")
        for name, tensor in tensors.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    )
    renamed = dict(_renamed(model, list(tensors), {*filled, *other, *constants}))
    used = {*renamed.values(), *(state.keys() - filled.keys()), *other}
    carried = {name: shape_of(tensor) for name, tensor in tensors.items() if name not in used}
    found = _faults(model, filled, {name: carried.get(name, "") for name in info["unexpected_keys"]}, other)
    return Fit(renamed, carried, filled, found)


def load(architecture: Architecture, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The model with the weights of a state dict that fits, as `from_pretrained` loads them.

    Args:
        architecture: The class and its configuration.
        tensors: The state dict.
        dtype: What the model computes in.

    Returns:
        The model on the CPU, in train mode, with memory of its own.
    """
    model, _ = _pretrained(architecture, dict(tensors), dtype)
    for own in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        own.data = own.data.clone()  # what was mapped from a file would change with it
    return model.train()


def _numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes, each of one number in one place of memory: which tensor it is.

    Of the dtype that the model is built in: another would be converted, and take memory.
    """

    def one(number: int, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        made = torch.full((1,), float(number)) if tensor.is_floating_point() else torch.zeros(1, dtype=dtype)
        return made.expand(tensor.shape)

    return {name: one(number, tensor) for number, (name, tensor) in enumerate(tensors.items())}


def _renamed(model: nn.Module, names: list[str], others: set[str]) -> Iterator[tuple[str, str]]:
    """By name in the model, the tensor of the file that it was loaded from, where that is called otherwise."""
    known = set(names)
    for name, tensor in model.state_dict().items():
        if name in others or name in known or not tensor.is_floating_point() or not tensor.numel():
            continue
        number = float(tensor.flatten()[0])
        if number.is_integer() and 0 <= number < len(names):
            yield name, names[int(number)]


def _faults(
    model: nn.Module, filled: Mapping[str, str], unexpected: Mapping[str, str], other: Mapping[str, str]
) -> str:
    """What from_pretrained would pass over, and is wrong: layers that are missing or left over, other shapes.

    What comes before the last layer of the base model, embeddings too, is no head that a task brings along.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    base: Any = getattr(model, "base_model", model)
    stacks = [name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{name}." for name in stacks)
    own = list(dict(base.named_parameters(remove_duplicate=False)))
    last = max((place for place, name in enumerate(own) if name.startswith(inside)), default=-1)
    trunk = set(own[: last + 1])

    def bare(name: str) -> str:
        return name.removeprefix(prefix)

    def in_base(name: str) -> bool:
        return base is model or name.startswith(prefix)

    missing = [f"{name} ({shape})" for name, shape in filled.items() if in_base(name) and bare(name) in trunk]
    left = [f"{name} ({shape})" for name, shape in unexpected.items() if bare(name).startswith(inside)]
    wrong = [f"{name} ({words})" for name, words in sorted(other.items())]
    return faults(missing, sorted(left), wrong)


def _pretrained(
    architecture: Architecture, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model as `from_pretrained` makes it of a state dict, and what it says about the names."""
    kind, configuration = parts(architecture.name, architecture.model_args)
    with alone(), torch.random.fork_rng(devices=[]):
        try:
            model, info = kind.from_pretrained(
                None,
                config=configuration,
                state_dict=tensors,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            raise unbuildable(architecture.name, error) from error
    return model, info
