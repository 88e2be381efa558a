"""Recipe group `quant`: how the frozen base is stored while the adapter trains."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting


class QuantKind(Enum):
    """Storage of the frozen weights (bitsandbytes)."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    none = "none"

    @property
    def is_4bit(self) -> bool:
        """Whether weights are stored in 4 bits."""
        return self in (QuantKind.nf4, QuantKind.fp4)

    @property
    def stored(self) -> str:
        """How weights are stored, in words."""
        return "in 4 bit" if self.is_4bit else "in 8 bit" if self is QuantKind.int8 else "not quantized"


class ComputeDtype(Enum):
    """Number format of matrix products and activations."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass
class QuantConfig(Sealed):
    """Quantization of the frozen base."""

    kind: QuantKind = setting(QuantKind.nf4, "Storage of the frozen linear weights.")
    double_quant: bool = setting(True, "Quantize the 4-bit block scales too; saves about 0.37 bit a weight.")
    compute_dtype: ComputeDtype = setting(ComputeDtype.bfloat16, "Format of activations and matrix products.")
    int8_outlier_threshold: float = setting(6.0, "LLM.int8: inputs above this magnitude stay in 16 bit.", minimum=0)
    keep_16bit: list[str] = setting([], "Module names kept in 16 bit beside the output head.")
    cache: bool = setting(
        True, "Keep a large base in 4 bit in the user's cache, so that the next run need not quantize it again."
    )
