"""What this GPU can do at best: matrix products of a step's sizes, and copies."""

import statistics
from collections.abc import Callable

import torch

PRODUCTS = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (8192, 4096, 128256))  # tokens, in, out
REPEATS = 10
COPIED = 1 << 30  # bytes


def milliseconds(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The median time of a call on the GPU, after three to warm up; `before` is made each time and does not count."""
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def bf16_tflops(tokens: int, width: int, out: int) -> float:
    """10^12 operations a second of [tokens, width] x [width, out] on random bf16."""
    left = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(out, width, device="cuda", dtype=torch.bfloat16).T
    return 2 * tokens * width * out / milliseconds(lambda: left @ right) / 1e9


def fp8_tflops(tokens: int, width: int, out: int) -> float:
    """The same in e4m3 with a scale for each row and column, to bf16."""
    left = torch.randn(tokens, width, device="cuda").to(torch.float8_e4m3fn)
    right = torch.randn(out, width, device="cuda").to(torch.float8_e4m3fn).T
    scales = torch.ones(tokens, 1, device="cuda"), torch.ones(1, out, device="cuda")

    def call() -> torch.Tensor:
        return torch._scaled_mm(left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * tokens * width * out / milliseconds(call) / 1e9


def ceiling() -> dict[str, object]:
    """TFLOP/s by product, and TB/s read and written by a copy; an entry that fails says why."""
    found: dict[str, object] = {}
    for name, measure in (("bf16", bf16_tflops), ("fp8", fp8_tflops)):
        for size in PRODUCTS:
            key = f"{name} {'x'.join(map(str, size))} TFLOP/s"
            try:
                found[key] = round(measure(*size), 1)
            except RuntimeError as error:
                found[key] = str(error).splitlines()[0]
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    found["copy TB/s"] = round(2 * COPIED / milliseconds(lambda: target.copy_(source)) / 1e9, 2)
    return found
