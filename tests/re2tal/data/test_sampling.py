import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.re2tal.data.sampling import TimeGrid, clipped, resized, sliding, truncated
from examples.re2tal.errors import Re2TALError

shapes = st.tuples(st.integers(1, 40), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[0]))


@given(
    duration=st.floats(0.1, 500),
    rate=st.floats(0.5, 60),
    shape=shapes,
    overlap=st.floats(0, 0.99),
)
def test_windows_cover_every_position(duration, rate, shape, overlap):
    frames, positions = shape
    views = sliding(duration, rate, frames, positions, overlap)
    step = frames / positions / rate
    covered = set()
    for view in views:
        start = round(view.grid.origin / step)
        assert np.isclose(view.grid.origin, start * step)
        assert 1 <= view.valid <= positions
        assert len(view.times) == frames
        covered |= set(range(start, start + view.valid))
    length = max(covered) + 1
    assert covered == set(range(length))
    assert (length - 1) * step < duration <= length * step * (1 + 1e-6) + 1e-6


@given(duration=st.floats(1, 300), rate=st.floats(1, 60), shape=shapes)
def test_pictures_of_a_window_are_a_rate_apart_and_stay_at_its_end(duration, rate, shape):
    frames, positions = shape
    for view in sliding(duration, rate, frames, positions, 0.5):
        shown = int(np.ceil(view.valid * frames / positions))
        assert np.allclose(view.times[:shown], view.grid.origin + np.arange(shown) / rate)
        assert np.all(view.times[shown:] == view.times[shown - 1])


def test_without_overlap_windows_do_not_share_positions_but_for_the_last():
    views = sliding(100.0, 1.0, 10, 10, 0.0)
    assert [view.grid.origin for view in views] == [10.0 * i for i in range(10)]
    views = sliding(95.0, 1.0, 10, 10, 0.0)
    assert [view.grid.origin for view in views][-2:] == [80.0, 85.0]


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_is_a_part(overlap):
    with pytest.raises(Re2TALError, match="less than 1"):
        sliding(10.0, 1.0, 10, 10, overlap)


@given(
    origin=st.floats(0, 100),
    step=st.floats(0.01, 10),
    positions=st.lists(st.floats(0, 50), min_size=1, max_size=9),
)
def test_positions_come_back_from_seconds(origin, step, positions):
    grid = TimeGrid(origin, step, 1e9)
    assert np.allclose(grid.positions(grid.seconds(np.array(positions))), positions, atol=1e-6)


def test_seconds_stay_within_the_video():
    grid = TimeGrid(5.0, 1.0, 8.0)
    assert grid.seconds(np.array([-9.0, 1.0, 9.0])).tolist() == [0.0, 6.0, 8.0]


@given(duration=st.floats(0.5, 500), shape=shapes)
def test_resizing_takes_the_middles_of_equal_parts(duration, shape):
    frames, positions = shape
    view = resized(duration, frames, positions)
    edges = np.linspace(0, duration, frames + 1)
    assert np.allclose(view.times, (edges[1:] + edges[:-1]) / 2)
    assert view.valid == positions
    assert np.isclose(view.grid.seconds(np.array(float(positions))), duration)


actions = st.lists(st.tuples(st.floats(0, 90), st.floats(0.5, 30)), max_size=5)


@given(duration=st.floats(1, 120), shape=shapes, actions=actions, seed=st.integers(0, 10**6))
def test_a_random_window_has_actions_that_lie_in_it(duration, shape, actions, seed):
    frames, positions = shape
    segments = np.array([(start, start + length) for start, length in actions]).reshape(-1, 2)
    random = np.random.default_rng(seed)
    view, chosen, inside = truncated(duration, 5.0, frames, positions, segments, random)
    assert len(view.times) == frames
    assert 1 <= view.valid <= positions
    assert len(chosen) == len(inside)
    assert np.all((inside >= 0) & (inside <= view.valid))
    for index, (start, end) in zip(chosen, inside, strict=True):
        whole = view.grid.positions(segments[index])
        assert end - start >= 0.75 * (whole[1] - whole[0]) - 1e-6
        assert start == max(whole[0], 0)
        assert end == min(whole[1], view.valid)


def test_a_window_without_any_action_within_reach_is_handed_out_without():
    segments = np.array([[200.0, 300.0]])
    view, chosen, inside = truncated(400.0, 1.0, 10, 10, segments, np.random.default_rng(0))
    assert len(chosen) == len(inside) == 0
    assert view.valid == 10


def test_what_is_outside_is_no_action_whatever_part_is_asked_for():
    chosen, inside = clipped(np.array([[-5.0, -1.0], [2.0, 12.0], [3.0, 4.0]]), 10, kept=0.0)
    assert chosen.tolist() == [1, 2]
    assert inside.tolist() == [[2.0, 10.0], [3.0, 4.0]]
