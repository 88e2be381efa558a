"""Starts the kernel of `summed_kernels.py` on tensors.

To be imported only where triton is installed; `summed.py` holds the same maths in torch, and chooses.
"""

from collections.abc import Sequence

import torch
import triton

from qlora_kit.engine.ops import summed_kernels as kernels
from qlora_kit.engine.ops.summed import MOST_PARTS, Sum

SLOTS = 6  # sums in one launch: of A and B of three modules
VALUES = 512  # of a sum to a program: four to a thread
WARPS = 4


def write_sums(sums: Sequence[Sum], places: Sequence[torch.Tensor]) -> None:
    """Write sums to dense float32 places, all on one device; factors have one dtype."""
    for start in range(0, len(sums), SLOTS):
        _write(sums[start : start + SLOTS], places[start : start + SLOTS])


def _write(sums: Sequence[Sum], places: Sequence[torch.Tensor]) -> None:
    """At most `SLOTS` of them."""
    blocks = triton.cdiv(max(place.numel() for place in places), VALUES)
    # Slots without a sum are never read: they repeat the first, so that one compiled kernel serves any number.
    idle = SLOTS - len(sums)
    jobs, outs = [*sums, *[sums[0]] * idle], (*places, *[places[0]] * idle)
    parts = tuple(one.parts for one in jobs)
    instead = next((one.factor for one in jobs if one.factor is not None), parts[0])
    factors = tuple(instead if one.factor is None else one.factor for one in jobs)
    counts = tuple(map(len, parts))
    steps = tuple(part.stride(0) if len(part) > 1 else 0 for part in parts)
    sizes, scales = tuple(out.numel() for out in outs), tuple(float(one.scale) for one in jobs)
    widths = tuple(2 * out.numel() if one.factor is None else out.shape[1] for out, one in zip(outs, jobs, strict=True))
    with torch.cuda.device(places[0].get_device()):
        kernels.write_sums_jit[(blocks, len(sums))](
            parts, factors, outs, counts, steps, sizes, widths, scales, SLOTS, MOST_PARTS, VALUES,
            num_warps=WARPS,
        )  # fmt: skip
