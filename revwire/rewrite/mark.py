"""The mark of a rewired model in what it is saved with by means of its own library: which network its weights are of.

A module may leave words in the metadata of its state_dict, beside the tensors and their names. Files of torch keep them
(Lightning's, timm's and Accelerate's among them), and load_state_dict hands them to the module in the same place, which
warns where it is rewired another way. transformers writes the attributes of a model's config: `revwire` is one of them,
which `revwire.rewire` follows.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from revwire.errors import RewireError
from revwire.libraries import MARK, settings_of
from revwire.planning.plan import Plan
from revwire.rewrite.wired import options_of, plan_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


_HANDLES = "_revwire_mark"
"""The attribute of a rewired model that holds the handles of its hooks."""


def put(model: nn.Module) -> None:
    """Mark a model that has just been rewired, or whose coupling has changed."""
    if _HANDLES not in model.__dict__:
        # a plain attribute: it is no child, and deepcopy takes it along
        model.__dict__[_HANDLES] = [
            model.register_state_dict_post_hook(_tell),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(_heed),  # type: ignore[no-untyped-call]
        ]
    if (settings := settings_of(model)) is not None:
        setattr(settings, MARK, {"plan": _plan_now(model).to_dict()})


def take_off(model: nn.Module) -> None:
    """Take the mark off a model that is no longer rewired."""
    for handle in model.__dict__.pop(_HANDLES, ()):
        handle.remove()
    if (settings := settings_of(model)) is not None and hasattr(settings, MARK):
        delattr(settings, MARK)


def marked(model: nn.Module) -> Plan | None:
    """The plan by which a model was rewired that was saved with its config; None where its config names none.

    Raises:
        RewireError: what its config says is no plan.
    """
    entry = getattr(settings_of(model), MARK, None)
    if entry is None:
        return None
    try:
        return Plan.from_dict(entry["plan"])
    except (RewireError, TypeError, KeyError) as error:
        raise RewireError(
            f"the config of this {type(model).__name__} has a {MARK!r} entry that is no mark of a rewired model "
            f"({error}); remove it from config.json, and say what it is rewired by"
        ) from error


def warn_unlike(wanted: Plan, found: Plan, saved: str, stacklevel: int) -> None:
    """Warn where a model that was rewired by one plan is rewired by another now."""
    if told := unlike(wanted, found):
        warnings.warn(
            f"{saved} are those of a {wanted.model} that was rewired {told[0]}; this {found.model} is rewired "
            f"{told[1]}, which is another function: rewire it the same way",
            stacklevel=stacklevel + 1,
        )


def unlike(wanted: Plan, found: Plan) -> tuple[str, str] | None:
    """What makes two plans two functions, in words for each; None where they are one. Dials of memory do not."""
    if (wanted.coupling, wanted.exact is False) != (found.coupling, found.exact is False):
        return _by(wanted), _by(found)
    lengths, others = ([len(chain.steps) for chain in each.chains] for each in (wanted, found))
    told = [f"in chains of {', '.join(map(str, each))} steps" for each in (lengths, others)]
    if lengths != others:
        return told[0], told[1]
    names, other_names = ([step.name for step in each.steps] for each in (wanted, found))
    # a model within another one has other paths
    if names == other_names or wanted.model != found.model:
        return None
    return told[0], "in chains of other blocks"


def _by(plan: Plan) -> str:
    return f"by coupling={plan.coupling!r}" + ("" if plan.exact is False else f", exact={plan.exact}")


def _plan_now(model: nn.Module) -> Plan:
    """The plan of a rewired model with the coupling that it has now."""
    plan, options = plan_of(model), options_of(model)
    assert plan is not None
    assert options is not None
    return replace(plan, coupling=options.coupling.spec)


def _tell(module: nn.Module, _state: Any, _prefix: str, metadata: dict[str, Any]) -> None:
    """Leave the mark in the metadata of a state_dict."""
    if plan_of(module) is not None:
        metadata[MARK] = _plan_now(module).to_json()


def _heed(module: nn.Module, _state: Any, _prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    """Warn where a state_dict is that of a model which was rewired another way."""
    text = metadata.get(MARK)
    if plan_of(module) is None or not isinstance(text, str):
        return
    try:
        wanted = Plan.from_json(text)
    except RewireError:  # of a later version
        return
    warn_unlike(wanted, _plan_now(module), "the weights that are loaded", stacklevel=2)
