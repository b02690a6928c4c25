"""The search for the largest batch, on a GPU of arithmetic; on a real one: `python -m benchmarks.gpu`."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.largest_batch import FINER, Largest, largest, table
from tests.helpers.commands import printed


class Arithmetic:
    """A model of so many bytes, and so many more an image, of which an allocator wastes a part."""

    def __init__(self, model, image, waste, limit):
        self.model, self.image, self.waste, self.limit = model, image, waste, limit
        self.tried = []

    def peak(self, batch):
        return self.model + self.image * batch

    def fits(self, batch):
        self.tried.append(batch)
        return self.peak(batch) * (1 + self.waste) <= self.limit


@given(st.integers(0, 900), st.floats(0.1, 20), st.floats(0, 0.4))
def test_the_largest_fits_and_a_little_more_does_not(model, image, waste):
    trial = Arithmetic(model, image, waste, 1000)
    found = largest(trial, 1000, small=1)
    assert len(trial.tried) < 150
    if found == 0:
        assert not trial.fits(1)
    else:
        assert trial.fits(found)
        assert not trial.fits(int(found * FINER) + 1)


def test_the_table_compares_with_plain_under_the_same_limit():
    rows = [Largest("plain", 24, 100, 1.0, 100.0), Largest("rewired", 24, 400, 5.0, 80.0)]
    last = printed(table(rows))[-2]
    assert [cell.strip() for cell in last.strip("│").split("│")] == [
        "rewired",
        "24",
        "400",
        "4.00",
        "80",
        "0.80",
    ]
    alone = printed(table([Largest("plain", 8, 0, float("nan"), 0.0)]))[-2]
    assert [cell.strip() for cell in alone.strip("│").split("│")] == ["plain", "8", "0", "", "0", ""]
