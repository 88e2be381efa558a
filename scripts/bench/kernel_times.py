"""Times the engine's Triton kernels on a GPU at the sizes of an 8B model, beside the time that their bytes take.

A kernel that only moves data can be no faster than a copy of as many bytes; the last column is how near it comes. What
was written before is flushed from the cache between calls, as other kernels do in a step.

    python scripts/bench/kernel_times.py
    python scripts/bench/kernel_times.py --tokens 2048 --only glu "glu backward"
    python scripts/bench/kernel_times.py --tiles         # other shares of the work for the gated product
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from train_step.ceiling import milliseconds

if TYPE_CHECKING:
    from qlora_kit.engine.ops.glu.kernels import TileConfig

HIDDEN, INNER, HEAD, RANK, ROW = 4096, 14336, 128, 16, 2048
BF16 = 2  # bytes
FLUSHED = 1 << 27  # bytes, more than a cache holds


class Case(NamedTuple):
    """A kernel, and the bytes that it has to read and write."""

    name: str
    call: Callable[[], object]
    moved: float


def drawn(*size: int, scale: float = 1.0) -> torch.Tensor:
    """Random bf16."""
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * scale


def low_rank(tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors as LoRA's are: left is a part of a wider product, right is stored transposed."""
    return drawn(tokens, 2 * RANK, scale=0.1)[:, :RANK], drawn(columns, RANK, scale=0.1).t()


def microseconds(call: Callable[[], object]) -> float:
    """The median time of a call that finds nothing in the cache."""
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    return 1000 * milliseconds(call, before=flushed.zero_)


def glu_cases(tokens: int, config: "TileConfig | None" = None) -> Iterator[Case]:
    """The two of the MLP; with another share of the work than the package has chosen."""
    from qlora_kit.engine.ops.glu.kernels import BACKWARD, start_glu, start_glu_backward
    from qlora_kit.engine.ops.lora_delta import LoraDelta

    wide = tokens * INNER * BF16
    gate, up, grad = (drawn(tokens, INNER) for _ in range(3))
    deltas = [LoraDelta(*low_rank(tokens, INNER)) for _ in range(3)]
    down = drawn(RANK, INNER, scale=0.02)
    yield Case("glu", lambda: start_glu(gate, up, (deltas[0], deltas[1]), down, True, config), 3 * wide)
    first, second = drawn(tokens, 2 * INNER).chunk(2, dim=1)
    back = config or BACKWARD
    yield Case(
        "glu backward",
        lambda: start_glu_backward(gate, up, grad, (deltas[0], deltas[1], deltas[2]), True, (first, second), back),
        5 * wide,
    )


def cases(tokens: int) -> Iterator[Case]:
    """Every kernel of a layer but cuBLAS's and cuDNN's."""
    from qlora_kit.engine.ops.lora_delta import LoraDelta, add_n
    from qlora_kit.engine.ops.rope import start_rope

    yield from glu_cases(tokens)
    row = tokens * HIDDEN * BF16
    x, out, more = drawn(tokens, HIDDEN), drawn(tokens, HIDDEN), LoraDelta(*low_rank(tokens, HIDDEN))
    cos, sin = drawn(ROW, HEAD), drawn(ROW, HEAD)
    yield Case("rope", lambda: start_rope(x, cos, sin, more, HEAD, out), 2 * row)
    yield Case("rope backward", lambda: start_rope(x, cos, sin, None, HEAD, out, is_back=True), 2 * row)
    yield Case("sum", lambda: add_n.kernel([x, out], more), 3 * row)
    yield from norms(x, out, row)
    yield unpacked()


def norms(x: torch.Tensor, residual: torch.Tensor, row: int) -> Iterator[Case]:
    """The two of a layer, compiled by torch."""
    from qlora_kit.engine.ops.rms_norm import rms_norm, rms_norm_backward_add

    weight, out = drawn(HIDDEN), torch.empty_like(x)
    yield Case("norm", lambda: rms_norm(x, weight, 1e-5, False), 2 * row)
    yield Case("norm backward", lambda: rms_norm_backward_add(x, weight, 1e-5, False, residual, residual, out), 4 * row)


def unpacked() -> Case:
    """The weight of gate, from NF4 with double quantization."""
    from bitsandbytes.nn import Linear4bit

    from qlora_kit.engine.ops.four_bit import FourBit

    packed = FourBit.of(Linear4bit(HIDDEN, INNER, bias=False, quant_type="nf4", compress_statistics=True).cuda())
    place = drawn(INNER, HIDDEN)
    return Case("unpack", lambda: packed.write(place), INNER * HIDDEN * (BF16 + 0.5))


def tiled(tokens: int) -> Iterator[Case]:
    """The kernels of the gated product with other shares of the work."""
    from qlora_kit.engine.ops.glu.kernels import TileConfig

    sizes = itertools.product((16, 32, 64, 128), (64, 128), (2, 4, 8), (4, 8), (1, 2, 3))
    for size, columns, parts, warps, stages in sizes:
        config = TileConfig(size, columns, parts, warps, stages)
        for case in glu_cases(tokens, config):
            yield case._replace(name=f"{case.name} {size}x{columns}, {parts} parts, {warps} warps, {stages} stages")


def copied() -> float:
    """Bytes that a copy reads and writes in a microsecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="*", metavar="KERNEL")
    parser.add_argument("--tiles", action="store_true")
    chosen = parser.parse_args()
    rate = copied()
    print(f"{torch.cuda.get_device_name(0)}: a copy moves {rate / 1e6:.2f} TB/s")
    print(f"{'kernel':52}      us  of a copy's rate")
    for case in tiled(chosen.tokens) if chosen.tiles else cases(chosen.tokens):
        if chosen.only and not any(case.name.startswith(name) for name in chosen.only):
            continue
        try:
            took = microseconds(case.call)
        except Exception as error:
            print(f"{case.name:52} {type(error).__name__}: {str(error).splitlines()[0][:60]}", flush=True)
            continue
        print(f"{case.name:52} {took:7.1f}  {case.moved / took / rate:6.0%}", flush=True)


if __name__ == "__main__":
    main()
