"""Settings that a forward reads: a rewired model follows their changes, and traces no more than that takes."""

from enum import Enum

import pytest

from tests.helpers.nets import assert_same, loss
from tests.helpers.stems import Net, noise, rewired
from tests.helpers.variants import variants


def test_a_setting_changed_afterwards_counts():
    class Setting(Net):
        def __init__(self):
            super().__init__()
            self.gain = 1.0

        def forward(self, x):
            return super().forward(x) * self.gain

    model = rewired(Setting().double()).eval()
    before, model.gain = model(noise()), 3.0
    assert_same([3 * before], [model(noise())])


class Scaled(Net):
    """Settings of every kind that a forward may read: its own number, a list, an enum's, and a helper's."""

    def __init__(self):
        super().__init__()
        self.gain, self.scales, self.mode, self.steps = 1.0, [1.0, 1.0], Mode.ONCE, 0

    def forward(self, x):
        out = super().forward(x)
        if self.checked and bool((out > 1e9).any()):
            raise ValueError("too large")
        return self.scaled(out)

    def scaled(self, x):
        return x * self.gain * self.scales[1] * (2 if self.mode is Mode.TWICE else 1)

    checked = False

    def advance(self):
        self.steps += 1


class Mode(Enum):
    ONCE = 1
    TWICE = 2


def test_settings_of_every_kind_count():
    model = rewired(Scaled().double()).eval()
    wanted = model(noise())
    for change, factor in (
        (lambda: setattr(model, "gain", 3.0), 3),
        (lambda: setattr(model, "scales", [1.0, 2.0]), 6),
        (lambda: model.scales.__setitem__(1, 4.0), 12),
        (lambda: setattr(model, "mode", Mode.TWICE), 24),
        (lambda: setattr(model, "gain", 1.0), 8),
    ):
        change()
        assert_same([factor * wanted], [model(noise())])


def test_what_forward_does_not_read_may_change_at_every_step():
    model = rewired(Scaled().double())
    known = sum(variants(model))
    for _ in range(5):
        model.advance()
        loss(model(noise())).backward()
    assert sum(variants(model)) <= known + 1


def test_a_setting_that_cannot_be_traced_stands_alone():
    """What was refused is that way of running, not the ones to come."""
    model = rewired(Scaled().double()).eval()
    wanted = model(noise())
    model.checked = True
    with pytest.warns(UserWarning, match="cannot be rewired"):
        model(noise())
    model.checked, model.gain = False, 3.0
    known = sum(variants(model))
    for _ in range(3):
        assert_same([3 * wanted], [model(noise())])
    assert sum(variants(model)) == known + 1
