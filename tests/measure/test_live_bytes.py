"""The meter of live tensors: what counts, from when on, and until when."""

import gc
import weakref

import torch

from revwire.measure.live_bytes import LiveBytes

KIB = 1024  # bytes of torch.ones(256)


def test_a_tensor_counts_until_it_is_dropped():
    with LiveBytes() as meter:
        a = torch.ones(256)
        assert (meter.live, meter.peak) == (KIB, KIB)
        b = a + 1
        assert (meter.live, meter.peak) == (2 * KIB, 2 * KIB)
        del a
        assert (meter.live, meter.peak) == (KIB, 2 * KIB)
        b = b + 1
        assert (meter.live, meter.peak) == (KIB, 2 * KIB)
    del b
    assert meter.live == 0


def test_views_and_in_place_results_count_once():
    with LiveBytes() as meter:
        a = torch.ones(256)
        views = [a.view(16, 16).t()[3:], a.detach(), a.add_(1), *a.split(64)]
        assert meter.live == KIB
        del a
        assert meter.live == KIB
        views.clear()
        assert meter.live == 0


def test_what_was_there_before_never_counts():
    before = torch.ones(256)
    with LiveBytes() as meter:
        views = [before.view(16, 16), before.detach().mul_(2), torch.add(before, 1, out=before)]
        assert meter.live == 0
        copy = before.clone()
        assert meter.live == KIB
    del before, views, copy
    assert (meter.live, meter.peak) == (0, KIB)


def test_a_tensor_made_from_python_numbers_counts():
    with LiveBytes() as meter:
        numbers = torch.tensor([1.0, 2.0])
        assert meter.live == numbers.nbytes == 8


def test_resized_storage_counts_with_its_new_size():
    with LiveBytes() as meter:
        a = torch.ones(256)
        a.resize_(512)
        assert (meter.live, meter.peak) == (2 * KIB, 2 * KIB)
        a.untyped_storage().resize_(0)
        assert meter.live == 0


def test_tensors_inside_a_wrapper_subclass_count():
    from torch.testing._internal.two_tensor import TwoTensor

    given = TwoTensor(torch.ones(256), torch.ones(256))
    with LiveBytes() as meter:
        made = given + 1
        assert meter.live == 2 * KIB
    del made
    assert meter.live == 0


def test_peak_can_start_again():
    with LiveBytes() as meter:
        kept = torch.ones(256)
        torch.ones(512)
        assert meter.peak == 3 * KIB
        meter.reset_peak()
        assert meter.peak == KIB
        del kept


def test_tensors_saved_by_autograd_count_until_backward_freed_them():
    x = torch.ones(256, requires_grad=True)
    x.grad = torch.zeros(256)
    with LiveBytes() as meter:
        loss = (2 * x).square().sum()  # square saves 2 * x; its own output is dropped
        assert (meter.live, meter.peak) == (KIB + 4, 2 * KIB + 4)
        loss.backward()
        assert meter.live == 4


def test_tensors_kept_on_a_custom_functions_context_count():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x * 2  # not through save_for_backward, where saved-tensor hooks would see it
            return x + 1

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.hidden

    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as meter:
        loss = Keeps.apply(x).sum()
        assert meter.live == KIB + 4
        del loss
        assert meter.live == 0


def test_the_meter_holds_nothing_itself():
    with LiveBytes() as meter:
        gone = weakref.ref(torch.ones(256))
    assert gone() is None
    freed = weakref.ref(meter)
    del meter
    gc.collect()
    assert freed() is None
