"""A Triton kernel for a block of columns of `error_compensation.py`.

To be imported only where triton is installed. Outputs do not know of each other, so that a program rounds all columns
of the block for some of them; one by one from torch, they are hundreds of short kernels.
"""

import torch
import triton
import triton.language as tl

OUTPUTS, WARPS = 32, 1  # the fastest of eight that were tried on an H200: 50 us for 28,672 outputs, 44 for 4,096
LARGEST = 1.0e6  # of a weight in steps of its grid: far outside of every code, and still a whole number in float32
HALFWAY = 12582912.0  # 1.5 * 2^23: what is added to it and taken away again was rounded to a whole number, half to even


def _round_columns(
    left: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    width: tl.tensor,
    outputs: tl.tensor,
    top: tl.constexpr,
    block: tl.constexpr,
    outputs_each: tl.constexpr,
    largest: tl.constexpr,
    halfway: tl.constexpr,
) -> None:
    """Columns `start` to `stop` of `left [width, outputs]`; what each loses is taken from those after it."""
    column = start + tl.arange(0, block)
    output = tl.program_id(0) * outputs_each + tl.arange(0, outputs_each)
    here = output < outputs
    place = column.to(tl.int64)[:, None] * outputs + output[None, :]
    values = tl.load(left + place, mask=(column < stop)[:, None] & here[None, :], other=0.0)
    for at in range(start, stop):
        row = tl.cast(at, tl.int64) * outputs + output
        value = tl.sum(tl.where((column == at)[:, None], values, 0.0), axis=0)
        step = tl.load(scale + row, mask=here, other=1.0)
        middle = tl.load(zero + row, mask=here, other=0.0)
        steps = tl.minimum(tl.maximum(tl.div_rn(value, step), -largest), largest)
        code = tl.minimum(tl.maximum((steps + halfway) - halfway + middle, 0.0), top)
        line = factor + tl.cast(at, tl.int64) * width
        factors = tl.load(line + column, mask=(column < stop) & (column > at), other=0.0)
        error = tl.div_rn(value - (code - middle) * step, tl.load(line + at))
        values -= factors[:, None] * error[None, :]
        tl.store(codes + row, code, mask=here)
        tl.store(errors + row, error, mask=here)


_round_columns_jit = triton.jit(_round_columns)


def round_columns(
    left: torch.Tensor,
    factor: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor],
    columns: tuple[int, int, int],
    codes: torch.Tensor,
    errors: torch.Tensor,
    bits: int,
) -> None:
    """Write codes and errors of some columns: all float32 and dense, `[in, out]`, but `factor [in, in]`.

    Args:
        grid: scale and zero of each weight.
        columns: the first, that after the last, and the most that a block has, a power of two.
    """
    programs = (triton.cdiv(left.shape[1], OUTPUTS),)
    with torch.cuda.device(left.get_device()):
        _round_columns_jit[programs](
            left, factor, *grid, codes, errors, *columns[:2], *left.shape, 2**bits - 1, columns[2], OUTPUTS, LARGEST,
            HALFWAY, num_warps=WARPS,
        )  # fmt: skip
