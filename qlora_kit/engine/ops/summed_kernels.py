"""Triton kernel that makes several small sums of parts in one launch.

To be imported only where triton is installed; `summed_triton.py` starts it.
"""

import triton
import triton.language as tl


def _write_sums(
    parts: tl.tuple,
    factors: tl.tuple,
    places: tl.tuple,
    counts: tl.tuple,
    steps: tl.tuple,
    sizes: tl.tuple,
    widths: tl.tuple,
    scales: tl.tuple,
    slots: tl.constexpr,
    most_parts: tl.constexpr,
    values_each: tl.constexpr,
) -> None:
    """Some values of the sum that `program_id(1)` is the number of, times a factor for each column and a scale.

    A sum without a factor has a width beyond its size.
    """
    job = tl.program_id(1)
    # What belongs to this sum is chosen from plain numbers: triton still sees that each is a multiple of 16, where they
    # all are, and reads four values at a time.
    part, factor, place = parts[0], factors[0], places[0]
    count, step, size, width, scale = counts[0], steps[0], sizes[0], widths[0], scales[0]
    for slot in tl.static_range(1, slots):
        is_this = job == slot
        part = tl.where(is_this, parts[slot], part)
        factor = tl.where(is_this, factors[slot], factor)
        place = tl.where(is_this, places[slot], place)
        count = tl.where(is_this, counts[slot], count)
        step = tl.where(is_this, steps[slot], step)
        size = tl.where(is_this, sizes[slot], size)
        width = tl.where(is_this, widths[slot], width)
        scale = tl.where(is_this, scales[slot], scale)
    value = tl.program_id(0) * values_each + tl.arange(0, values_each)
    inside = value < size
    found = tl.load(part + value, mask=inside, other=0.0)
    by = tl.load(factor + value % width, mask=inside & (width <= size), other=1.0).to(tl.float32)
    # Written out and masked, not a loop to `count`: several parts are then on their way before the first is added.
    for number in tl.static_range(1, most_parts):
        found += tl.load(part + step.to(tl.int64) * number + value, mask=inside & (number < count), other=0.0)
    tl.store(place + value, found * by * scale, mask=inside)


write_sums_jit = triton.jit(_write_sums)
