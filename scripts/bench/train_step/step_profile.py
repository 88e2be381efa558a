"""Where the GPU's time of one step goes, by kind of work, and how far the step is from its matrix products alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from train_step.ceiling import bf16_tflops
from train_step.clock import synchronized
from train_step.shapes import frozen_shapes

FROZEN, THIN = "frozen matmuls", "LoRA and head matmuls"
RECORDED = "matmuls of recorded layers"  # frozen or LoRA's: a kernel of a CUDA graph does not know its operation
ATTENTION, DEQUANTISE, ELEMENTWISE = "attention", "dequantise", "norm, activation, elementwise"
OPTIMIZER, OTHER = "optimizer", "other"
PRODUCT_OPS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::bmm", "aten::baddbmm", "aten::matmul")
# Parts of kernel names, in the order they are asked.
BY_NAME = (
    (DEQUANTISE, ("dequant", "unpack", "nf4")),
    (ATTENTION, ("flash", "fmha", "sdpa", "attention", "cudnn_generated")),
    (OPTIMIZER, ("multi_tensor", "adam", "optimizer")),
    (THIN, ("gemm", "nvjet", "cutlass", "xmma", "matmul", "scaled_mm")),
    (
        ELEMENTWISE,
        (
            "elementwise",
            "rms",
            "norm",
            "silu",
            "swiglu",
            "rope",
            "triton",
            "round",
            "reduce",
            "softmax",
            "copy",
            "_glu",
            "_add_n",
            "_fold",
        ),  # the last are the engine's own
    ),
)


def kind_of(
    kernel: str, op: str = "", sizes: Sequence[Sequence[int]] = (), frozen: frozenset[tuple[int, ...]] = frozenset()
) -> str:
    """The kind of work of a kernel, from its name and from the operation that started it, if that is known.

    Args:
        sizes: shapes of the operation's arguments.
        frozen: (out, in) of the quantized layers.
    """
    if op in PRODUCT_OPS:
        place = 2 if op == "aten::addmm" else 1
        right = tuple(sizes[place]) if len(sizes) > place else ()
        return FROZEN if right in frozen or right[::-1] in frozen else THIN
    for text in (kernel.lower(), op.lower()):
        for kind, parts in BY_NAME:
            if any(part in text for part in parts):
                return RECORDED if kind == THIN and not op else kind
    return OTHER


class StepProfile:
    """Profiles one step of a `StepClock`.

    Args:
        at: number of the step, from 1.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.seconds = 0.0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, record_shapes=True)

    def __call__(self, step: int, is_over: bool) -> None:
        """Start before the step and stop after it."""
        if step != self.at:
            return
        if not is_over:
            self._profile.start()
            self._began = synchronized()
        else:
            self.seconds = synchronized() - self._began
            self._profile.stop()

    def milliseconds(self, frozen: frozenset[tuple[int, ...]]) -> Counter[str]:
        """GPU time by kind."""
        found: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        events: Any = self._profile.events() or []  # type: ignore[no-untyped-call]
        for event in events:
            if event.device_type == DeviceType.CPU:
                for kernel in event.kernels:
                    found[kind_of(kernel.name, event.name, event.input_shapes, frozen)] += kernel.duration / 1e3
                    seen[kernel.name] += kernel.duration / 1e3
        # Kernels that no operation is known to have started; spans that a user marked are no work of the GPU.
        launched: Counter[str] = Counter()
        for event in events:
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
                launched[event.name] += event.time_range.elapsed_us() / 1e3
        for name, milliseconds in (launched - seen).items():
            found[kind_of(name)] += milliseconds
        return found

    def table(self, config: Any, tokens: int) -> dict[str, object]:
        """Milliseconds by kind and of the gaps; the products' ideal time at the rate measured now, and its share.

        The ideal counts 4 operations for each frozen weight, the head's included, and token.
        """
        shapes = frozen_shapes(config)
        kinds = self.milliseconds(frozenset(shapes))
        total = self.seconds * 1e3
        rows = {kind: round(kinds[kind], 2) for kind in sorted(kinds, key=lambda kind: -kinds[kind])}
        found: dict[str, object] = {"step_ms": round(total, 2), "kinds_ms": rows}
        found["gaps_ms"] = round(total - sum(kinds.values()), 2)
        if torch.cuda.is_available():
            inner = sum(out * width * count for (out, width), count in shapes.items())
            rate = bf16_tflops(tokens, config.hidden_size, config.intermediate_size)
            ideal = 4 * tokens * (inner + config.vocab_size * config.hidden_size) / rate / 1e9
            found |= {"matmul_tflops": round(rate, 1), "ideal_ms": round(ideal, 2)}
            found["ideal_share"] = round(ideal / total, 3)
            if kinds[FROZEN]:
                found["frozen_tflops"] = round(4 * tokens * inner / kinds[FROZEN] / 1e9, 1)
        return found
