"""Dr2Net's schedule: from the pretrained network to the reversible one while training goes on."""

import pytest
import torch

import revwire
from revwire import RewireError
from revwire.rewrite.wired import options_of, with_options
from revwire.run.options import Options
from tests.helpers.couplings import Trunk, noise
from tests.helpers.nets import assert_same, gradients, loss
from tests.helpers.steps import kept


def test_schedule_moves_saves_and_goes_on():
    x = noise()
    model = revwire.rewire(Trunk(3), x, coupling="dr2net")
    schedule = revwire.Dr2NetSchedule(model, 10, start=(0.875, 0.125), end=(0, 1))
    assert options_of(model).coupling == revwire.Dr2Net(0.875, 0.125)
    betas = []
    for i in range(12):
        assert options_of(model).coupling == schedule.coupling
        assert schedule.coupling.alpha + schedule.coupling.beta == pytest.approx(1)
        betas.append(schedule.coupling.beta)
        if i == 4:
            state = schedule.state_dict()
        schedule.step()
    assert betas == sorted(betas)
    assert schedule.coupling == revwire.Dr2Net(0, 1)
    other = revwire.Dr2NetSchedule(model, 1)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert options_of(model).coupling == other.coupling
    assert other.coupling.beta == betas[4]


def test_an_exact_schedule_takes_powers_of_two():
    model = revwire.rewire(Trunk(3), noise(), coupling="dr2net", exact=True)
    schedule = revwire.Dr2NetSchedule(model, 50, end=(0, 1))
    seen = []
    for _ in range(51):
        seen.append(schedule.coupling.beta)
        loss(model(noise())).backward()
        schedule.step()
    assert sorted(set(seen)) == [0.125, 0.25, 0.5, 1.0]


def test_a_forward_in_flight_keeps_its_coefficients():
    x = noise(dtype=torch.float64)
    net = Trunk(4, dropout=0.0).double()
    model = revwire.rewire(net, x, coupling="dr2net(alpha=0.5,beta=0.5)")
    schedule = revwire.Dr2NetSchedule(model, 1, start=(0.5, 0.5), end=(0.2, 0.8))
    wanted = []
    for coupling in (revwire.Dr2Net(0.5, 0.5), revwire.Dr2Net(0.2, 0.8)):
        copied = kept(with_options(model, Options(coupling)))
        loss(copied(x)).backward()
        wanted.append(gradients(copied))
    first = model(x)
    schedule.step()
    second = model(x)
    loss(second).backward()
    assert_same(wanted[1], gradients(model))
    model.zero_grad()
    loss(first).backward()
    assert_same(wanted[0], gradients(model))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: revwire.Dr2NetSchedule(Trunk(2), 5), "not rewired; call revwire.rewire"),
        (lambda m: revwire.Dr2NetSchedule(revwire.rewire(Trunk(2), noise()), 5), "rewired with re2tal"),
        (lambda m: revwire.Dr2NetSchedule(m, 0), "at least one step"),
        (lambda m: revwire.Dr2NetSchedule(m, 5, start=(1, 0)), "beta must be larger than 0"),
    ],
)
def test_schedules_that_cannot_be(make, says):
    model = revwire.rewire(Trunk(2), noise(), coupling="dr2net")
    with pytest.raises(RewireError, match=says):
        make(model)
