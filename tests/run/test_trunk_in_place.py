"""What model code changes in place of the trunk between two rewired blocks: it leaves the chain there, or raises."""

import pytest
import torch

from revwire import RevwireError
from tests.helpers.middle import Leaving, agree, noise, pair
from tests.helpers.nets import WIDTH, assert_same


def add_to_a_slice(x):
    x[:, 0].add_(1)
    return x


def add_through_a_name(x):
    tokens = x[:, 1:3]
    tokens += 1
    return x


def set_items(x):
    x[:, 0] = x[:, 1] * 2
    return x


def scale(x):
    x.mul_(0.5)
    return x


def scale_a_detached_view(x):
    with torch.no_grad():
        x[0].mul_(0.5)
    return x


def write_into(x):
    x.copy_(x * 2)
    return x


def detach(x):
    x.detach_()
    return x


@pytest.mark.parametrize(
    "middle",
    [add_to_a_slice, add_through_a_name, set_items, scale, scale_a_detached_view, write_into, detach],
)
def test_a_trunk_changed_in_place_leaves_the_chain(middle):
    # the merged tensor by hand is changed like any other: autograd refuses none of these
    agree(Leaving, middle)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("middle", [add_to_a_slice, set_items, scale])
def test_a_trunk_changed_in_place_without_grad_leaves_the_chain(middle, mode):
    reference, model = pair(middle)
    with mode():
        assert_same([Leaving(reference)(noise())], [model(noise())])


def view_changes(x):
    x.view(2, 2, WIDTH).add_(1)
    return x


def transposed_changes(x):
    x.t().mul_(2)
    return x


def base_changes(x):
    view = x.unsqueeze(0)
    x.mul_(2)
    return view.squeeze(0)


def slice_of_view_changes(x):
    x.view(2, 2, WIDTH)[0] = 1
    return x


def looked_at_before(x):
    """The merged tensor is made by then; that of the view is another."""
    assert x.norm() > 0
    view = x.reshape(4, WIDTH)
    view.mul_(2)
    return torch.stack([view, x])[1]


@pytest.mark.parametrize(
    "middle", [view_changes, transposed_changes, base_changes, slice_of_view_changes, looked_at_before]
)
def test_a_trunk_changed_in_place_through_a_view_raises(middle):
    _, model = pair(middle)
    with pytest.raises(RevwireError, match="changed in place through a view"):
        model(noise())
