"""Recipe group `engine`: how the math of a step is run."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting


class EngineMode(Enum):
    """Implementations of the same step."""

    auto = "auto"
    plain = "plain"
    fast = "fast"


class Compute(Enum):
    """Number format of the products with frozen weights."""

    bf16 = "bf16"
    fp8_backward = "fp8_backward"
    fp8 = "fp8"


@dataclass
class EngineConfig(Sealed):
    """The engine."""

    mode: EngineMode = setting(
        EngineMode.plain,
        "plain runs peft as it is; fast runs the same math by hand; auto is fast on a GPU that has the kernels for it.",
    )
    compute: Compute = setting(
        Compute.bf16,
        "Products with frozen weights: bf16, or fp8 (e4m3) backward or both ways. Price in held-out loss, measured on "
        "the demo base over two seeds: fp8_backward +0.01%, fp8 +0.33%.",
    )
    cached_weights: str = setting(
        "auto",
        "Fast: frozen weights that are kept dequantized too, which spares that work twice a step: none, all, an amount "
        "such as 6GB, or auto: what half of the memory left over holds, if nothing is recomputed.",
    )
    recompute: str = setting(
        "auto",
        "What is recomputed in the backward pass: none, all, a budget such as 20GB for what is kept, or auto.",
    )
    cuda_graphs: bool = setting(
        True, "Fast on a GPU: layers of batches that keep their shape are captured once and replayed."
    )
