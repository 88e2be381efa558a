"""Bytes are counted as tensors come and go."""

import pytest
import torch

from qlora_kit.engine.ops.op import Op, compiled
from qlora_kit.model.live_memory import LiveMemory

MEGABYTE = 2**20


def of_megabytes(count):
    return torch.zeros(count, MEGABYTE // 4)


def test_what_is_made_counts_until_nothing_holds_it():
    with LiveMemory() as live:
        first = of_megabytes(1)
        part = first[:1]
        both = first + 1.0
        assert live.now == live.peak == 2 * MEGABYTE
        del first
        assert live.now == 2 * MEGABYTE  # a view holds all of it
        del part, both
        assert (live.now, live.peak) == (0, 2 * MEGABYTE)
        live.begin_peak()
        assert live.peak == 0


def test_what_was_there_before_counts_only_where_it_is_held():
    held, other = of_megabytes(1), of_megabytes(2)
    with LiveMemory() as live:
        live.hold([held])
        assert not other.t().is_contiguous()
        other.add_(1.0)
        assert live.now == MEGABYTE


def test_what_is_kept_for_a_backward_pass_counts_until_it_is_over():
    weight = of_megabytes(1).requires_grad_()
    with LiveMemory() as live:
        loss = (weight.exp() * 2.0).sum()
        assert MEGABYTE <= live.now < MEGABYTE + 64  # the result of exp
        loss.backward()
        del loss
        assert live.now == MEGABYTE  # the gradient alone
        assert 3 * MEGABYTE <= live.peak < 3 * MEGABYTE + 64


def test_an_operation_that_is_one_kernel_on_a_gpu_counts_by_its_results():
    def _in_three_steps(x):
        return ((x + 1.0) * 2.0).sum(0)

    operation, x = compiled(_in_three_steps), of_megabytes(4)
    for as_on_gpu, most in ((True, MEGABYTE), (False, 8 * MEGABYTE)):
        with LiveMemory(as_on_gpu=as_on_gpu) as live:
            found = operation(x)
            assert live.now == MEGABYTE
            assert live.peak == most
        assert torch.equal(found, x.sum(0) + 8.0)


@pytest.mark.parametrize(("takes", "most"), [(True, MEGABYTE), (False, 5 * MEGABYTE)])
def test_an_operation_whose_kernel_does_not_take_its_arguments_counts_step_by_step(takes, most):
    def in_two_steps(rows):
        return (rows + 1.0).sum(0)

    def supported(_rows):
        return takes

    operation, x = Op("in_two_steps", in_two_steps, in_two_steps, supported), of_megabytes(4)
    with LiveMemory(as_on_gpu=True) as live:
        operation(x)
        assert live.peak == most
