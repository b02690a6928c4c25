"""The checks of `verify`: copies of one model, wired in different ways, run and compared."""

from __future__ import annotations

import copy
import statistics
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revwire.measure.live_bytes import LiveBytes
from revwire.measure.modes import both_modes
from revwire.measure.report import Check
from revwire.measure.specimen import cast, difference, floats, move_statistics, move_weights, seed
from revwire.measure.step import mean_square
from revwire.measure.watching import Growth, around_steps
from revwire.planning.choose import FLOAT32_ROUNDING, MOST_NOISE
from revwire.pytree import tree_leaves
from revwire.rewrite.swap import apply_plan
from revwire.rewrite.unwiring import unwire
from revwire.rewrite.wired import with_options
from revwire.run.coupling import Original
from revwire.run.exact import dropped_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from revwire.find.probe import Probe
    from revwire.measure.drift import Drifts
    from revwire.planning.plan import Plan
    from revwire.run.options import Options
    from revwire.run.streams import Streams
    from revwire.run.tape import Link


GRADIENT_BOUND = 1e-5


GRADIENT_BOUND_FLOAT64 = 1e-10


# reconstructing a stream rounds it a second time for each of the two times that forward did; where a model amplifies
# rounding, plain float32 autograd is this far from float64 for each of its own
GRADIENT_ROUNDINGS = 4


# where an activation's input is within rounding of its kink, plain float32 autograd and the second run may come out on
# different sides, and neither is wrong. Weights a little beside decide: what is wrong is wrong there, too
DRAWS = 3


DECOMPOSITION_BOUND_FLOAT64 = 1e-12


HELD_BOUND = 0.05


# a parameter whose true gradient is zero (the bias of a key projection) has nothing but rounding errors to compare:
# differences are relative to at least this share of the largest gradient norm of the model
GRADIENT_FLOOR = 1e-3


@dataclass(frozen=True)
class Step:
    """What one training step left behind."""

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor
    growth: float = 0.0


@dataclass(frozen=True)
class Ran:
    """A step that ran: its link, the bytes of its trunk, and weak references to the storages made meanwhile."""

    link: Link
    trunk: int
    storages: list[Callable[[], torch.UntypedStorage | None]]


class Runs:
    """Copies of one model, wired in different ways, and what comparing them shows."""

    def __init__(
        self, pristine: nn.Module, found: Probe, plan: Plan, options: Options, args: Any, kwargs: Any
    ) -> None:
        self.pristine, self.plan, self.options = pristine, plan, options
        self.args, self.kwargs = args, kwargs
        self.original = copy.deepcopy(pristine)
        self.parallel = any(r.parallel for r in found.residuals)
        self.sharing = {f"{r.frame.path or '(model)'}#{r.index}" for r in found.residuals if r.shared}
        self._before = _storages(pristine)
        # from here on the pristine model is the rewired one that every run copies
        apply_plan(pristine, plan, found, options)
        # of the rewired network, which is another function
        move_statistics(pristine, args, kwargs)
        moved = dict(pristine.named_buffers())
        for name, buffer in self.original.named_buffers():
            buffer.data.copy_(moved[name])

    def wired(self, **changed: Any) -> nn.Module:
        """A rewired copy of the model, with other options where there are `changed` ones."""
        return with_options(self.pristine, replace(self.options, **changed))

    def state_dict(self) -> Check:
        """Invariant 1: the same keys and the very same tensors."""
        before, after = self._before, _storages(self.pristine)
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return Check("state_dict, changed", len(changed), 0, ", ".join(changed[:3]))

    def modes(self) -> Iterator[Check]:
        """Invariant 9: every step runs rewired in both modes, which are one function."""
        yield from both_modes(self.original, self.wired, self.plan, self.options, (self.args, self.kwargs))

    def decomposition(self, *, training: bool) -> Check:
        """Invariant 2: the rewritten code with the plain recurrence is the original network."""
        dtype = torch.float64 if self.parallel else None
        models = copy.deepcopy(self.original), self.wired(coupling=Original(), exact=False)
        args, kwargs = cast((self.args, self.kwargs), dtype)
        outputs = []
        for model in models:
            model.to(dtype).train(training)
            seed(1)
            with torch.no_grad():
                outputs.append(floats(model(*args, **kwargs)))
        figure = max((difference(a, b) for a, b in zip(*outputs, strict=True)), default=float("nan"))
        how = (
            "relative, in float64 (parallel branches)"
            if self.parallel
            else "largest difference to the original"
        )
        name = f"decomposition, {'train' if training else 'eval'}"
        return Check(name, figure, DECOMPOSITION_BOUND_FLOAT64 if self.parallel else 0, how)

    def gradients(self, *, training: bool) -> Iterator[Check]:
        """Invariant 3: gradients, buffers and random state as with plain autograd through the same recurrence."""
        mode = "train" if training else "eval"
        exact = self._step(torch.float64, replay=False, training=training)
        found = self._step(torch.float64, replay=True, training=training)
        worst, where = _worst_gradient(exact.gradients, found.gradients)
        noise, _ = self._noise(2.0**-53, training=training)
        bound = max(GRADIENT_BOUND_FLOAT64, min(noise, GRADIENT_BOUND))
        yield Check(f"gradients, {mode}, float64", worst, 0 if self._exact(exact) else bound, where)
        if not training and any(step.slices > 1 for step in self.plan.steps):
            yield self.slices()
        plain = self._step(None, replay=False, training=training)
        found = self._step(None, replay=True, training=training)
        check = self._float32(exact, plain, found, training=training)
        for draw in range(1, DRAWS):
            if check.ok or self._exact(plain):
                break
            beside = (
                self._step(torch.float64, replay=False, training=training, draw=draw),
                self._step(None, replay=False, training=training, draw=draw),
                self._step(None, replay=True, training=training, draw=draw),
            )
            check = self._float32(*beside, training=training)
        yield check
        if training:
            moved = [
                name for name, buffer in plain.buffers.items() if not torch.equal(buffer, found.buffers[name])
            ]
            differing = moved + ([] if torch.equal(plain.random, found.random) else ["(random state)"])
            name = "buffers, random state"
            yield Check(name, len(differing), 0, ", ".join(differing[:3]))

    def _float32(self, exact: Step, plain: Step, found: Step, *, training: bool) -> Check:
        # no float32 run can be asked to agree more closely with plain float32 than that agrees with the truth
        rounding, _ = _worst_gradient(exact.gradients, plain.gradients)
        worst, where = _worst_gradient(plain.gradients, found.gradients)
        noise, note = self._noise(FLOAT32_ROUNDING, training=training)
        growth = exact.growth * GRADIENT_ROUNDINGS * FLOAT32_ROUNDING
        if growth > GRADIENT_BOUND:
            note += f"; states are reconstructed with {exact.growth:.3g} roundings of their own size"
        where += f"; plain autograd itself is {rounding:.1e} off{note}"
        bound = max(GRADIENT_BOUND, GRADIENT_ROUNDINGS * rounding, min(max(noise, growth), MOST_NOISE))
        return Check(
            f"gradients, {'train' if training else 'eval'}, float32",
            worst,
            0 if self._exact(plain) else bound,
            where,
        )

    def slices(self) -> Check:
        """Branches run slice by slice give the gradients of the whole batch; in eval mode, as slices draw their own."""
        # a grid would make a unit of it where a sum is rounded the other way
        both = (
            self._step(torch.float64, replay=False, training=False, sliced=s, exact=False)
            for s in (True, False)
        )
        worst, where = _worst_gradient(*(step.gradients for step in both))
        return Check("slices, eval, float64", worst, GRADIENT_BOUND_FLOAT64, where)

    def _exact(self, step: Step) -> bool:
        """Whether gradients have to be equal to the bit; GPU kernels add up in an order of their own."""
        return self.options.exact is not False and all(
            g.device.type == "cpu" for g in step.gradients.values()
        )

    def _noise(self, rounding: float, *, training: bool) -> tuple[float, str]:
        """What the inverse makes of rounding errors over the longest chain, and that in words."""
        coupling = self.options.coupling.in_mode(training=training)
        if self.options.exact is not False or not coupling.a or coupling.noise == 1:
            return 0.0, ""
        steps = max(len(chain.steps) for chain in self.plan.chains)
        note = f"; the inverse amplifies rounding {coupling.noise:.3g} times a step, {steps} steps"
        return coupling.error_after(steps, 4 * rounding), note

    def reconstruction(self, drift: Drifts) -> Iterator[Check]:
        """Exact chains come back to the bit."""
        if self.options.exact is not False:
            found = [(d.exact, d.chain) for d in drift.chains if d.exact is not None]
            worst, where = max(found, default=(0.0, "nothing is run again"))
            yield Check("chain inputs, exact", worst, 0, where)

    def _step(self, dtype: torch.dtype | None, *, training: bool, draw: int = 0, **changed: Any) -> Step:
        model = self.wired(**changed)
        if draw:
            move_weights(model, draw)
        model.to(dtype).train(training)
        args, kwargs = cast((self.args, self.kwargs), dtype)
        seed(2)
        growth = Growth()
        with growth.watched():
            loss = mean_square(model(*args, **kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Step(gradients, dict(model.named_buffers()), _random_state(args, kwargs), growth.factor)

    def memory(self) -> Check:
        """Invariant 4: of what a step makes, nothing is held when the forward is over."""
        model = self.wired()
        model.train()
        model(*self.args, **self.kwargs)  # caches that stay are filled before anything is counted
        with LiveBytes() as meter, _steps_watched(meter) as made:
            output = model(*self.args, **self.kwargs)
        # what the model hands out is not the step's, nor what other steps read of it (T5's position bias); and each
        # chain holds its last pair, once
        # activations that it puts on modules are its own as well
        kept = [vars(m)[key] for m in model.modules() for key in vars(m) if not key.startswith("_")]
        own = [t for t in tree_leaves([output, kept]) if isinstance(t, Tensor)]
        own += [tensor for step in made for tensor in step.link.held]
        runs = [run for step in made for run in step.link.runs]
        own += [t for run in runs for t in tree_leaves(run.sides) if isinstance(t, Tensor)]
        own += [numbers for run in runs for numbers in run.sampled]
        excused = {id(t.untyped_storage()) for t in own}
        shares: dict[str, list[float]] = {"no step but such as hand out inner values": [0.0]}
        for step in made:
            link = step.link
            keeps = "keep" in {link.branch.mode, link.next.branch.mode if link.next else ""}
            if link.branch.name in self.sharing or keeps:
                continue  # what they hand out belongs to whoever uses it; others hold what they were asked to
            alive = [s for ref in step.storages if (s := ref()) is not None and id(s) not in excused]
            module = step.link.branch.name.partition("#")[0]
            shares.setdefault(module, []).append(sum(s.nbytes() for s in alive) / step.trunk)
        worst = max(shares, key=lambda name: statistics.mean(shares[name]))
        packed = dropped_bits(self.options.coupling) / 32 if self.options.exact is not False else 0.0
        return Check("trunks held a step", statistics.mean(shares[worst]), HELD_BOUND + packed, worst)

    def way_back(self) -> Check:
        """Invariant 5: unwiring gives the same classes and bit-identical outputs."""
        original, back = self.original, unwire(self.wired())
        classes = [type(a) is not type(b) for a, b in zip(original.modules(), back.modules(), strict=True)]
        outputs = []
        for model in (original, back):
            model.eval()
            with torch.no_grad():
                outputs.append(floats(model(*self.args, **self.kwargs)))
        differing = sum(not torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        return Check("unwired, differing", sum(classes) + differing, 0)


@contextmanager
def _steps_watched(meter: LiveBytes) -> Iterator[list[Ran]]:
    """The steps that run in the block, each with the storages that were made while it ran."""
    made: list[Ran] = []

    def note(step: Callable[[], Streams], *_: Any) -> Streams:
        before = {id(ref) for ref in meter.counted()}
        following = step()
        assert following.link is not None
        new = [ref for ref in meter.counted() if id(ref) not in before]
        made.append(Ran(following.link, following.current.nbytes, new))
        return following

    with around_steps(note):
        yield made


def _storages(model: nn.Module) -> dict[str, int]:
    # a state_dict may hold what is no tensor (get_extra_state)
    state = model.state_dict().items()
    return {key: each.untyped_storage().data_ptr() for key, each in state if isinstance(each, Tensor)}


def _worst_gradient(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    if only := sorted(wanted.keys() ^ found.keys()):
        return float("inf"), f"only one of both has a gradient: {', '.join(only[:3])}"
    floor = GRADIENT_FLOOR * max(float(gradient.norm()) for gradient in wanted.values())
    errors = {
        name: float((found[name].double() - gradient.double()).norm())
        / max(float(gradient.norm()), floor, 1e-300)
        for name, gradient in wanted.items()
    }
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


def _random_state(*inputs: Any) -> Tensor:
    """The states of the CPU's generator and of those of the devices that the inputs are on."""
    leaves = tree_leaves(inputs)
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "cpu"}
    states = [torch.get_device_module(d).get_rng_state(d) for d in sorted(devices, key=str)]
    return torch.cat([torch.get_rng_state(), *states])
