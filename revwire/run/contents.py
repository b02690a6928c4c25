"""What modules hold: every container that a branch can change or depend on, and the tensors and generators in them.

Containers are the attributes, children, hooks, parameters and buffers of the modules, and the lists, dicts, sets and
plain objects found among the attributes. What is noted must not keep the graph of an earlier call alive: of a tensor
with a history, a detached one is noted.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire._torch import AnyTrackingNorm, wraps_others
from revwire.run.ambient import imported_generators, is_generator
from revwire.run.containers import INTERNAL, Part, SameDicts, is_plain_object, same, swap

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import ExitStack

_hooks_of = itemgetter(
    *(key for key in INTERNAL if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")))
)
_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type, range, slice}
    | {torch.dtype, torch.device, torch.Size}
    | {FunctionType, BuiltinFunctionType, MethodType, ModuleType}
)
_COPYABLE = 2**16
"""Numbers in a tensor that is a mere attribute, up to which it is copied; a larger one may not change."""
_MOST = 4096
"""Containers noted for one branch; what lies deeper is left to the check of the second run."""


@dataclass(eq=False, slots=True)
class Held:
    """A tensor among the contents.

    Attributes:
        owner: The class that holds it.
        key: By what name.
        places: Where it is noted, as (content, key).
    """

    owner: type
    key: str
    places: list[tuple[Any, Any]]

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.owner.__name__}.{self.key}"


class Contents:
    """What modules hold at the moment when this is made.

    Args:
        modules: The modules that a branch calls; their children are noted too.
        own: What the branch's code reads itself, as (owner, name).

    Attributes:
        modules: The modules, and all below them.
        tensors: What tensors they hold.
        held: The same, with where they are held.
        copied: Which of them may change without a word, by their index.
        moving: Which of those do.
        normed: Norms that move their statistics.
        scripted: Script modules that may change their buffers.
        scripts: Whether there are script modules.
        generators: Random generators among the attributes, and those that the modules' code has imported.
        summed: Which of those that may change without a word are known by a sum; None before a forward has run.
        lasts: Whether this may be kept for longer than a step: it keeps nothing alive but what the model is made of.
    """

    def __init__(self, modules: Sequence[nn.Module], own: Sequence[tuple[nn.Module, str]]) -> None:
        self.modules = reached(modules)
        self.tensors: list[Tensor] = []
        self.held: list[Held] = []
        self.copied: list[int] = []
        self.moving: list[int] = []
        self.summed: list[int] | None = None
        self.normed: list[nn.Module] = []
        self.scripted: list[torch.jit.ScriptModule] = []
        self.scripts = False
        self.generators = imported_generators(self.modules)
        self.lasts = True
        self._of = list(modules), list(own)
        self._noted: list[tuple[Any, Any]] = []
        self._bare: list[dict[int, Any]] = []
        self._index: dict[int, int] = {}
        self._seen: set[int] = set()
        self._replaced: dict[int, Any] = {}
        self._left = _MOST
        for module in self.modules:
            self._note_module(module)
        for owner, key in own:
            self._note_own(owner, key)
        self._dicts, self._others = SameDicts(), list[tuple[Any, Any]]()
        for container, content in self._noted:
            if type(content) is dict:
                self._dicts.add(container, content)
            else:
                self._others.append((container, content))
        del self._index, self._seen, self._replaced

    def is_of(self, modules: Sequence[nn.Module], own: Sequence[tuple[nn.Module, str]]) -> bool:
        """Whether this is what these modules hold now."""
        tops, owners = self._of
        if len(tops) != len(modules) or not all(map(is_, tops, modules)) or owners != own:
            return False
        return self.there() and not any(self._bare)

    def there(self) -> bool:
        """Whether all containers hold what was noted, but for hooks where there were none."""
        return self._dicts.there() and all(same(container, content) for container, content in self._others)

    def put_back(self, stack: ExitStack, patches: Mapping[int, Mapping[Any, Any]]) -> None:
        """Fill all containers with what was noted; leaving the stack puts back what is there now.

        Args:
            stack: Undoes it.
            patches: What stands in for tensors, by the id of a content, and their key there.
        """
        for container, noted in self._noted:
            content = noted
            if id(noted) in patches:
                content = copy.copy(noted)
                for key, tensor in patches[id(noted)].items():
                    content[key] = tensor
            if not same(container, content):
                swap(container, content, stack)

    def take_off_hooks(self, stack: ExitStack) -> None:
        """Take off the hooks of modules that had none of the kind; those that had some are noted as containers."""
        if any(self._bare):
            for hooks in filter(None, self._bare):
                swap(hooks, {}, stack)

    def _note_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._note_scripted(module)
            return
        own = module.__dict__
        if self._note(own, type(module)) is not None:
            # a module is there as long as its model, so its own attributes may be held
            self._noted.append((own, self._replaced.pop(id(own))))
        every = _hooks_of(own)
        if any(every):
            for hooks in every:
                if hooks:
                    self._content(hooks, dict(hooks))
                else:
                    self._bare.append(hooks)
        else:
            self._bare += every
        if children := module._modules:
            self._content(children, children.copy())
        if parameters := module._parameters:
            self._note_tensors(parameters, type(module), copied=False)
        if buffers := module._buffers:
            norm = isinstance(module, AnyTrackingNorm)
            if norm and module.training:
                self.normed.append(module)
            else:
                # the statistics of a norm move with every forward in training, and say so to nobody
                self._note_tensors(buffers, type(module), copied=True, moving=norm)

    def _note_scripted(self, module: torch.jit.ScriptModule) -> None:
        self.lasts = False  # its mode is held elsewhere
        self.scripts = True
        for name, parameter in module.named_parameters(recurse=False):
            self._tensor(parameter, type(module), name, copied=False)
        if module.training:
            self.scripted.append(module)

    def _note_own(self, owner: nn.Module, key: str) -> None:
        for container in (owner._parameters, owner._buffers, owner.__dict__):
            if key in container and id(container) not in self._seen:
                value = container[key]
                content = Part({key: self._plain(value) if isinstance(value, Tensor) else value})
                self._noted.append((container, content))
                if isinstance(value, Tensor) and value.grad_fn is None:
                    copied = container is not owner._parameters
                    self.lasts &= container is not owner.__dict__
                    self._tensor(value, type(owner), key, copied=copied).places.append((content, key))

    def _content(self, container: Any, content: Any) -> None:
        self._seen.add(id(container))
        self._noted.append((container, content))

    def _note_tensors(
        self, tensors: Mapping[str, Tensor | None], owner: type, *, copied: bool, moving: bool = False
    ) -> None:
        content: dict[str, Any] = dict(tensors)
        self._content(tensors, content)
        for key, tensor in tensors.items():
            if tensor is not None:
                # torch.func.functional_call lends weights with a history
                content[key] = plain = self._plain(tensor)
                self._tensor(plain, owner, key, copied=copied, moving=moving).places.append((content, key))

    def _tensor(self, tensor: Tensor, owner: type, key: str, *, copied: bool, moving: bool = False) -> Held:
        at = self._index.setdefault(id(tensor), len(self.tensors))
        if at == len(self.tensors):
            self.tensors.append(tensor)
            self.held.append(Held(owner, key, []))
            if copied:
                self.copied.append(at)
        if moving:
            self.moving.append(at)
        return self.held[at]

    def _plain(self, tensor: Tensor) -> Tensor:
        if tensor.grad_fn is None:
            return tensor
        self.lasts = False
        return tensor.detach().requires_grad_()

    def _note(self, container: Any, owner: type) -> Any | None:
        """Note a container's content, and those of the containers in it.

        Returns:
            None; or, where a tensor with a history is in it, a copy without one, which is to be noted in its place.
        """
        kind = dict if isinstance(container, dict) else set if isinstance(container, set) else list
        content: Any = kind(container)
        at = len(self._noted)
        self._content(container, content)
        entries: Iterable[tuple[Any, Any]]
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        internal = INTERNAL if isinstance(container, dict) else ()
        history = False
        for key, value in entries:
            if type(value) in _ATOMS or key in internal:  # of most attributes there is nothing more to note
                continue
            cleaned = self._value(value, owner, key, content)
            if cleaned is not value:
                history = True
                if kind is not set:
                    content[key] = cleaned
        if not history or kind is set:
            return None
        self._replaced[id(container)] = content
        self._noted[at] = (content, content)  # the container itself is held by nobody here
        return content

    def _value(self, value: Any, owner: type, key: Any, content: Any) -> Any:
        """Note what a container holds; returns what the note holds in its place."""
        if isinstance(value, Tensor):
            self.lasts = False
            if value.grad_fn is not None:
                return value.detach().requires_grad_()
            if not wraps_others(value) and not value.is_inference():
                held = self._tensor(value, owner, str(key), copied=value.numel() <= _COPYABLE)
                if isinstance(content, dict | list):
                    held.places.append((content, key))
            return value
        if isinstance(value, nn.Module) or id(value) in self._seen or self._left <= 0:
            return self._replaced.get(id(value), value)
        self._left -= 1
        if isinstance(value, tuple):
            return self._tuple(value, owner, key)
        if isinstance(value, dict | list | set | deque):
            clean = self._note(value, owner)
            return (
                value if clean is None else deque(clean, value.maxlen) if isinstance(value, deque) else clean
            )
        if is_generator(value):
            self._generator(value)
        elif is_plain_object(value):
            return self._object(value)
        return value

    def _generator(self, value: Any) -> None:
        if not any(value is known for known in self.generators):
            self.generators.append(value)

    def _object(self, value: Any) -> Any:
        self._seen.add(id(value))
        if (attributes := self._note(value.__dict__, type(value))) is None:
            return value
        other = self._replaced[id(value)] = copy.copy(value)
        other.__dict__.update(attributes)
        return other

    def _tuple(self, value: tuple[Any, ...], owner: type, key: Any) -> Any:
        cleaned = [v if type(v) in _ATOMS else self._value(v, owner, key, None) for v in value]
        if all(map(is_, cleaned, value)) or type(value) is not tuple:
            return value
        return tuple(cleaned)


def reached(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all below them, each once."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        waiting += [child for child in module._modules.values() if child is not None]
    return found
