"""Recipe group `export`: what to merge into, and the files to write."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, knob


class MergeBase(Enum):
    """The weights that the adapter's update is added to."""

    dequantized = "dequantized"
    original = "original"


class GgufMix(Enum):
    """llama.cpp's file types: one name for a mix of block formats."""

    F16 = "F16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q5_K_S = "Q5_K_S"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q3_K_M = "Q3_K_M"
    Q2_K = "Q2_K"


@dataclass
class MergedTarget(Sealed):
    """A plain safetensors folder."""

    dtype: str = knob("bfloat16", "Number format of the weights; bfloat16 is the only one so far.")


@dataclass
class GgufTarget(Sealed):
    """One file for llama.cpp, Ollama and what is built on them."""

    mix: GgufMix = knob(GgufMix.Q4_K_M, "File type.")


@dataclass
class GptqTarget(Sealed):
    """GPTQ, as vLLM and transformers load it."""

    bits: int = knob(4, "Bits a weight: 2, 3, 4 or 8.", minimum=2, maximum=8)
    group_size: int = knob(128, "Weights that share a scale; -1 is a whole row.", unit="weights", minimum=-1)
    desc_act: bool = knob(False, "Quantize columns in order of activation size: closer, slower to serve.")
    sym: bool = knob(True, "Symmetric range without zero points.")


@dataclass
class AwqTarget(Sealed):
    """AWQ in the GEMM layout that vLLM and transformers load."""

    bits: int = knob(4, "Bits a weight; the layout exists for 4.", minimum=4, maximum=4)
    group_size: int = knob(128, "Weights that share a scale.", unit="weights", minimum=-1)
    zero_point: bool = knob(True, "Asymmetric range with zero points.")


@dataclass
class ExportConfig(Sealed):
    """One merge, any number of files."""

    merge_base: MergeBase = knob(
        MergeBase.dequantized, "dequantized is what the adapter was trained on; original is the 16-bit base."
    )
    calibration_rows: int = knob(32, "Training rows that GPTQ and AWQ look at.", unit="rows", minimum=1)
    score_rows: int = knob(24, "Held-out rows on which each file is compared with the trained model.", minimum=1)
    max_mean_kl: float | None = knob(
        None, "Reject a file whose mean KL is above this; exit code 3.", unit="nats", above=0
    )
    gguf: dict[str, GgufTarget] = knob({}, "GGUF files to write, by name.")
    gptq: dict[str, GptqTarget] = knob({}, "GPTQ folders to write, by name.")
    awq: dict[str, AwqTarget] = knob({}, "AWQ folders to write, by name.")
    merged: dict[str, MergedTarget] = knob({}, "16-bit folders to write, by name.")
