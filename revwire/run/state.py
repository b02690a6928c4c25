"""What modules hold, noted before a branch runs, and put back for as long as it runs again.

Noted are the contents of every container that a branch can change or depend on: the attributes, children, hooks,
parameters and buffers of its modules, and the lists, dicts, sets and plain objects found among the attributes. Tensors
are noted by their in-place version; those that no operator need announce a change of (buffers, tensors that are mere
attributes) by a copy too, which is kept only where the forward did change them.

What is noted must not keep the graph of an earlier call alive: of a tensor with a history, a detached one is noted.
"""

from __future__ import annotations

import copy
from collections import deque
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from revwire._torch import AnyTrackingNorm, wraps_others
from revwire.run.ambient import RandomState, random_state
from revwire.run.containers import Part, is_plain_object, same, swap
from revwire.run.noted import Noted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import ExitStack

_INTERNAL = frozenset(nn.Module().__dict__)
_hooks_of = itemgetter(
    *(key for key in _INTERNAL if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")))
)
_ATOMS = frozenset(
    {
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(None),
        type,
        torch.dtype,
        torch.device,
        torch.Size,
        range,
        slice,
    }
    | {FunctionType, BuiltinFunctionType, MethodType, ModuleType}
)
_PLAIN_ATTRIBUTES: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What modules held when they were noted last, of those that hold nothing that could change but by being replaced."""
_COPYABLE = 2**16
"""Numbers in a tensor that is a mere attribute, up to which it is copied; a larger one may not change."""
_MOST = 4096
"""Containers noted for one branch; what lies deeper is left to the check of the second run."""


class ModuleState:
    """What modules hold at the moment when this is made.

    Args:
        modules: The modules that a branch calls; their children are noted too.
        own: What the branch's code reads itself, as (owner, name).

    Attributes:
        modules: The modules, and all below them.
        generators: The states of random generators found among the attributes.
    """

    __slots__ = (
        "_bare",
        "_contents",
        "_left",
        "_normed",
        "_replaced",
        "_scripted",
        "_seen",
        "_tensors",
        "generators",
        "modules",
    )

    def __init__(self, modules: Sequence[nn.Module], own: Iterable[tuple[nn.Module, str]]) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self.modules = reached(modules)
        self._normed: list[nn.Module] = []
        self._bare: list[dict[int, Any]] = []
        self._scripted: list[tuple[Tensor, Tensor]] = []
        self._tensors: dict[int, Noted] = {}
        self._seen: set[int] = set()
        self._replaced: dict[int, Any] = {}
        self._left = _MOST
        self.generators: list[RandomState] = []
        for module in self.modules:
            self._note_module(module)
        for owner, key in own:
            self._note_own(owner, key)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that were noted."""
        return [n.tensor for n in self._tensors.values() if isinstance(n.tensor, nn.Parameter)]

    def settle(self, where: str) -> None:
        """Look at what the branch's forward, which is over, has changed.

        Raises:
            ReplayError: it changed a weight, which a second run would do once more.
        """
        for noted in self._tensors.values():
            noted.settle()
            if noted.moved and noted.copy is None:
                noted.check(where)
        self._scripted = [(b, was) for b, was in self._scripted if not torch.equal(b, was)]
        self.generators = [state for state in self.generators if state.moved()]

    def check(self, where: str) -> None:
        """See to it that all tensors can be put back.

        Raises:
            ReplayError: one was changed in place since the forward, or freed.
        """
        for noted in self._tensors.values():
            noted.check(where)

    def put_back(self, stack: ExitStack) -> None:
        """Make the modules what they were; leaving the stack makes them what they are now again."""
        for noted in self._tensors.values():
            if noted.moved or noted.tensor.requires_grad is not noted.requires_grad:
                again = noted.again()
                for content, key in noted.places:
                    content[key] = again
        self._put_back_hooks(stack)
        for container, content in self._contents:
            if not same(container, content):
                swap(container, content, stack)
        for norm in self._normed:
            # in training they read no statistics, and move them: those of copies
            fresh = {k: None if b is None else b.clone() for k, b in norm._buffers.items()}
            swap(norm._buffers, fresh, stack)
        for buffer, was in self._scripted:
            # a script module's buffers cannot be others
            now = buffer.clone()
            buffer.copy_(was)
            stack.callback(buffer.copy_, now)

    def _put_back_hooks(self, stack: ExitStack) -> None:
        """Take off the hooks of modules that had none of the kind; those that had some are noted as containers."""
        if any(self._bare):
            for hooks in filter(None, self._bare):
                swap(hooks, {}, stack)

    def _note_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            self._note_scripted(module)
            return
        own = module.__dict__
        self._note_attributes(module, own)
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
                self._normed.append(module)
            else:
                # the statistics of a norm move with every forward in training, and say so to nobody
                self._note_tensors(buffers, type(module), copied=True, moving=norm)

    def _note_attributes(self, module: nn.Module, own: dict[str, Any]) -> None:
        known = _PLAIN_ATTRIBUTES.get(module)
        if known is not None and same(own, known):
            self._content(own, known)
            return
        if self._note(own, type(module)) is not None:
            # a module is there as long as its model, so its own attributes may be held
            self._contents.append((own, self._replaced.pop(id(own))))
        elif all(_is_atom(value) for key, value in own.items() if key not in _INTERNAL):
            _PLAIN_ATTRIBUTES[module] = dict(own)

    def _note_scripted(self, module: torch.jit.ScriptModule) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            self._tensor(parameter, (type(module), name), copied=False)
        if module.training:
            self._scripted += [(b, b.detach().clone()) for b in module.buffers(recurse=False)]

    def _note_own(self, owner: nn.Module, key: str) -> None:
        for container in (owner._parameters, owner._buffers, owner.__dict__):
            if key in container and id(container) not in self._seen:
                content = Part(container, key)
                self._contents.append((container, content))
                value = container[key]
                if isinstance(value, Tensor):
                    content[key] = self._plain(value)
                    if value.grad_fn is None:
                        noted = self._tensor(
                            value, (type(owner), key), copied=container is not owner._parameters
                        )
                        noted.places.append((content, key))

    def _content(self, container: Any, content: Any) -> None:
        self._seen.add(id(container))
        self._contents.append((container, content))

    def _note_tensors(
        self, tensors: Mapping[str, Tensor | None], owner: type, *, copied: bool, moving: bool = False
    ) -> None:
        content: dict[str, Any] = dict(tensors)
        self._content(tensors, content)
        for key, held in tensors.items():
            if held is not None:
                # torch.func.functional_call lends weights with a history
                content[key] = tensor = self._plain(held)
                noted = self._tensor(tensor, (owner, key), copied=copied)
                noted.places.append((content, key))
                noted.moved |= moving

    def _tensor(self, tensor: Tensor, label: tuple[type, str], *, copied: bool) -> Noted:
        noted = self._tensors.get(id(tensor))
        if noted is None:
            copy = tensor.detach().clone() if copied else None
            noted = self._tensors[id(tensor)] = Noted(tensor, label, copy)
        return noted

    @staticmethod
    def _plain(tensor: Tensor) -> Tensor:
        return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()

    def _note(self, container: Any, owner: type) -> Any | None:
        """Note a container's content, and those of the containers in it.

        Returns:
            None; or, where a tensor with a history is in it, a copy without one, which is to be noted in its place.
        """
        kind = dict if isinstance(container, dict) else set if isinstance(container, set) else list
        content: Any = kind(container)
        at = len(self._contents)
        self._content(container, content)
        entries: Iterable[tuple[Any, Any]]
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        internal = _INTERNAL if isinstance(container, dict) else ()
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
        self._contents[at] = (content, content)  # the container itself is held by nobody here
        return content

    def _value(self, value: Any, owner: type, key: Any, content: Any) -> Any:
        """Note what a container holds; returns what the note holds in its place."""
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                return value.detach().requires_grad_()
            if not wraps_others(value) and not value.is_inference():
                noted = self._tensor(value, (owner, str(key)), copied=value.numel() <= _COPYABLE)
                if isinstance(content, dict | list):
                    noted.places.append((content, key))
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
        if (state := random_state(value)) is not None:
            self.generators.append(state)
        elif is_plain_object(value):
            return self._object(value)
        return value

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


def _is_atom(value: Any) -> bool:
    return type(value) in _ATOMS or (type(value) is tuple and all(map(_is_atom, value)))


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
