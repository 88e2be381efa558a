"""Recipe group `export`: what to merge into, and the files to write."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from qlora_kit.schema.field import Sealed, setting
from qlora_kit.schema.issue import Issue

MIXING = ("gptq", "gguf")  # groups whose files may hold each layer in a format of its own
OUTSIDE_BLOCKS = ("token_embd", "output")  # GGUF tensors that a budget of bits leaves to the mix and to overrides


class MergeBase(Enum):
    """The weights that the adapter's update is added to."""

    auto = "auto"
    dequantized = "dequantized"
    original = "original"
    best = "best"


class GgufMix(Enum):
    """llama.cpp's file types: one name for a mix of block formats, more bits first."""

    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q5_K_S = "Q5_K_S"
    Q5_1 = "Q5_1"
    Q5_0 = "Q5_0"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_1 = "Q4_1"
    Q4_0 = "Q4_0"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    Q3_K_L = "Q3_K_L"
    Q3_K_M = "Q3_K_M"
    Q3_K_S = "Q3_K_S"
    IQ3_M = "IQ3_M"
    IQ3_S = "IQ3_S"
    IQ3_XS = "IQ3_XS"
    IQ3_XXS = "IQ3_XXS"
    Q2_K = "Q2_K"
    Q2_K_S = "Q2_K_S"
    IQ2_M = "IQ2_M"
    IQ2_S = "IQ2_S"
    IQ2_XS = "IQ2_XS"
    IQ2_XXS = "IQ2_XXS"
    IQ1_M = "IQ1_M"
    IQ1_S = "IQ1_S"

    @property
    def needs_imatrix(self) -> bool:
        """Whether its files are garbage without an importance matrix."""
        return self.value in ("Q2_K_S", "IQ3_XS", "IQ3_XXS") or self.value.startswith(("IQ2", "IQ1"))


@dataclass
class ExportTarget(Sealed):
    """One file or folder to write."""

    @property
    def needs(self) -> dict[str, str]:
        """Optional packages that writing it takes, each with the extra that installs it."""
        return {}

    def issues(self, path: str) -> Iterator[Issue]:
        """What is wrong with it by itself, before any model is looked at.

        Args:
            path: of the target, such as `export.merged.merged_16bit`.
        """
        yield from ()


class MixingTarget(ExportTarget):
    """One whose layers may differ, so that a budget of bits can be spent on them."""

    bits_budget: float | None

    def decided(self) -> str | None:
        """The first pattern that decides what a budget is to decide."""
        return None

    def against_budget(self, path: str, budget_path: str) -> Iterator[Issue]:
        """What else does not go with a budget that is set at `budget_path`."""
        yield from ()


@dataclass
class MergedTarget(ExportTarget):
    """A plain safetensors folder."""

    dtype: str = setting("bfloat16", "Number format of the weights; bfloat16 is the only one so far.")

    def issues(self, path: str) -> Iterator[Issue]:
        """Another number format."""
        if self.dtype != "bfloat16":
            where = f"{path}.dtype"
            yield Issue(where, f"{where}={self.dtype} is not written; only bfloat16 is", f"{where}=bfloat16")


@dataclass
class GgufTarget(MixingTarget):
    """One file for llama.cpp, Ollama and what is built on them."""

    mix: GgufMix = setting(GgufMix.Q4_K_M, "File type.")
    imatrix: bool = setting(
        True, "Fit blocks to the inputs that calibration rows cause; file types of 8 and 16 bits do without."
    )
    overrides: dict[str, str] = setting(
        {}, "Block types by glob on GGUF tensor names, such as 'blk.*.ffn_down.weight': Q6_K; the last match counts."
    )
    bits_budget: float | None = setting(
        None, "This file's own export.bits_budget; null takes the shared one.", unit="bits", above=0
    )
    shard_gb: float | None = setting(None, "Split into files of at most this size.", unit="GB", above=0)

    @property
    def needs(self) -> dict[str, str]:
        """The container and the row kernels."""
        return {"gguf": "gguf", "libgguf": "gguf"}

    def issues(self, path: str) -> Iterator[Issue]:
        """A mix without the matrix that it needs."""
        if self.mix.needs_imatrix and not self.imatrix:
            where = f"{path}.imatrix"
            yield Issue(where, f"{self.mix.value} files are garbage without an importance matrix", f"{where}=true")

    def decided(self) -> str | None:
        """A pattern for tensors inside the blocks."""
        return next((pattern for pattern in self.overrides if not pattern.startswith(OUTSIDE_BLOCKS)), None)

    def against_budget(self, path: str, budget_path: str) -> Iterator[Issue]:
        """Several files, whose sizes must be known beforehand."""
        if self.shard_gb is not None:
            where = f"{path}.shard_gb"
            what = f"{where} names the files beforehand, and {budget_path} chooses their sizes while they are written"
            yield Issue(where, what, f"{where}=null")


class GptqMethod(Enum):
    """How the codes of a GPTQ file are chosen."""

    gptq = "gptq"
    rounding = "rounding"


@dataclass
class GptqOverride(Sealed):
    """What is different for the layers that a pattern names."""

    bits: int | None = setting(None, "Bits a weight: 2, 3, 4 or 8; null takes the target's.", minimum=2, maximum=8)
    group_size: int | None = setting(
        None, "Weights that share a scale; null takes the target's.", unit="weights", minimum=-1
    )
    skip: bool = setting(False, "These layers stay in 16 bits.")


@dataclass
class GptqTarget(MixingTarget):
    """GPTQ, as vLLM and transformers load it."""

    bits: int = setting(4, "Bits a weight: 2, 3, 4 or 8.", minimum=2, maximum=8)
    group_size: int = setting(128, "Weights that share a scale; -1 is a whole row.", unit="weights", minimum=-1)
    desc_act: bool = setting(False, "Quantize columns in order of activation size: closer, slower to serve.")
    sym: bool = setting(True, "Symmetric range without zero points.")
    method: GptqMethod = setting(
        GptqMethod.gptq, "rounding is the RTN baseline: the nearest values, without calibration."
    )
    damping: float = setting(
        0.05, "gptq: share of the mean input energy added to each channel's before inverting.", above=0, maximum=0.99
    )
    overrides: dict[str, GptqOverride] = setting(
        {}, "Layers that differ, by pattern: '*.down_proj', or 're:' and a regular expression; the first match counts."
    )
    bits_budget: float | None = setting(
        None, "This file's own export.bits_budget; null takes the shared one.", unit="bits", above=0
    )

    @property
    def needs(self) -> dict[str, str]:
        """The library that calibrates."""
        return {"gptqmodel": "gptq"}

    def issues(self, path: str) -> Iterator[Issue]:
        """Bits that no file holds."""
        if self.bits not in (2, 3, 4, 8):
            where = f"{path}.bits"
            yield Issue(where, f"GPTQ packs 2, 3, 4 or 8 bits, not {self.bits}", f"{where}=4")

    def decided(self) -> str | None:
        """A pattern with bits of its own."""
        return next((pattern for pattern, override in self.overrides.items() if override.bits is not None), None)


class AwqLayout(Enum):
    """Layouts of AutoAWQ."""

    gemm = "gemm"
    gemv = "gemv"


# Weights that share a scale, as the kernels of each layout take them.
AWQ_GROUP_SIZES = {AwqLayout.gemm: (16, 32, 64, 128, -1), AwqLayout.gemv: (64, 128)}


@dataclass
class AwqTarget(ExportTarget):
    """AWQ folders: GEMM for vLLM, SGLang and transformers, GEMV for transformers on a GPU, one request at a time."""

    bits: int = setting(4, "Bits a weight; the layout exists for 4.", minimum=4, maximum=4)
    group_size: int = setting(128, "Weights that share a scale.", unit="weights", minimum=-1)
    zero_point: bool = setting(True, "Asymmetric range with zero points.")
    layout: AwqLayout = setting(AwqLayout.gemm, "gemv: another order of the same codes, for one request at a time.")

    @property
    def needs(self) -> dict[str, str]:
        """The library that reads the file back."""
        return {"gptqmodel": "gptq"}

    def issues(self, path: str) -> Iterator[Issue]:
        """Groups that readers of the layout do not take."""
        if self.group_size not in (sizes := AWQ_GROUP_SIZES[self.layout]):
            where = f"{path}.group_size"
            what = f"readers of AWQ files ({self.layout.value}) take groups of {', '.join(map(str, sizes))}, not "
            yield Issue(where, f"{what}{self.group_size}", f"{where}=128")


class CompressedScheme(Enum):
    """Schemes of compressed-tensors that vLLM and SGLang serve: bits of weights (W) and of activations (A)."""

    W4A16 = "W4A16"
    W8A16 = "W8A16"
    W8A8 = "W8A8"
    FP8 = "FP8"
    FP8_DYNAMIC = "FP8_DYNAMIC"
    NVFP4 = "NVFP4"
    NVFP4A16 = "NVFP4A16"
    MXFP4 = "MXFP4"


@dataclass
class CompressedTarget(ExportTarget):
    """A compressed-tensors folder, as vLLM and SGLang load it."""

    scheme: CompressedScheme = setting(CompressedScheme.W4A16, "Formats of weights and activations.")
    group_size: int = setting(128, "W4A16: weights that share a scale.", unit="weights", minimum=-1)
    smoothing: float = setting(0.8, "W8A8: share of activation outliers moved into the weights.", minimum=0, maximum=1)
    kv_cache_fp8: bool = setting(False, "Scales for an fp8 key-value cache are measured and stored.")

    @property
    def takes_experts(self) -> bool:
        """Whether the kit makes it by itself, layer by layer, experts one by one."""
        own = (CompressedScheme.W4A16, CompressedScheme.W8A16, CompressedScheme.FP8_DYNAMIC)
        return self.scheme in own and not self.kv_cache_fp8

    @property
    def needs(self) -> dict[str, str]:
        """The library that quantizes."""
        return {"llmcompressor": "compressed"}


class BnbKind(Enum):
    """Formats that bitsandbytes loads as they are stored."""

    nf4 = "nf4"
    int8 = "int8"


@dataclass
class BnbTarget(ExportTarget):
    """A bitsandbytes folder: transformers, vLLM and further training load it without quantizing again."""

    kind: BnbKind = setting(BnbKind.nf4, "Number format of the linear weights.")
    double_quant: bool = setting(True, "nf4: quantize the scales too.")


@dataclass
class Fp8BlockTarget(ExportTarget):
    """A folder of FP8 weights in blocks of 128 x 128, as vLLM, SGLang and transformers load it."""


class AdapterFormat(Enum):
    """Forms of an adapter that is served beside its base."""

    peft = "peft"
    gguf = "gguf"


@dataclass
class AdapterTarget(ExportTarget):
    """The adapter alone, for servers that load LoRA at run time."""

    format: AdapterFormat = setting(AdapterFormat.peft, "peft: vLLM, SGLang, transformers; gguf: llama.cpp, Ollama.")


@dataclass
class ExportConfig(Sealed):
    """One merge, any number of files."""

    merge_base: MergeBase = setting(
        MergeBase.auto,
        "dequantized is what the adapter was trained on; original is the 16-bit base; auto is dequantized, but for a "
        "bitsandbytes file in the format of the training base, which would round the update away, original; best "
        "writes each file from both, and keeps the one with the lower held-out loss.",
    )
    calibration_rows: int = setting(
        32, "Rows that GPTQ, AWQ, the importance matrix and activation scales look at.", unit="rows", minimum=1
    )
    general_text_share: float = setting(
        0.1,
        "Share of the calibration rows that is built-in general text instead of training rows.",
        minimum=0,
        maximum=1,
    )
    score_rows: int = setting(24, "Held-out rows on which each file is compared with the trained model.", minimum=1)
    bits_budget: float | None = setting(
        None,
        "Mean bits of a weight in the layers of GPTQ and GGUF files, scales included: the format of each layer is "
        "chosen by what it would cost on the calibration rows.",
        unit="bits",
        above=0,
    )
    max_mean_kl: float | None = setting(
        None, "Reject a file whose mean KL is above this; exit code 3.", unit="nats", above=0
    )
    gguf: dict[str, GgufTarget] = setting({}, "GGUF files to write, by name.")
    gptq: dict[str, GptqTarget] = setting({}, "GPTQ folders to write, by name.")
    awq: dict[str, AwqTarget] = setting({}, "AWQ folders to write, by name.")
    merged: dict[str, MergedTarget] = setting({}, "16-bit folders to write, by name.")
    compressed: dict[str, CompressedTarget] = setting({}, "compressed-tensors folders to write, by name.")
    bnb: dict[str, BnbTarget] = setting({}, "bitsandbytes folders to write, by name.")
    fp8_block: dict[str, Fp8BlockTarget] = setting({}, "Folders of FP8 blocks to write, by name.")
    adapter: dict[str, AdapterTarget] = setting({}, "Adapters to write, by name.")

    def without(self, names: Collection[str]) -> "ExportConfig":
        """The same without the files of these names."""
        groups = {field.name: getattr(self, field.name) for field in fields(self)}
        left: dict[str, Any] = {
            group: {name: target for name, target in named.items() if name not in names}
            for group, named in groups.items()
            if isinstance(named, dict)
        }
        return replace(self, **left)

    def targets(self) -> "Iterator[Named]":
        """Every file or folder, group by group."""
        for field in fields(self):
            group = getattr(self, field.name)
            for name, target in group.items() if isinstance(group, dict) else ():
                yield Named(name, field.name, target)


@dataclass(frozen=True)
class Named:
    """A target with its name and its group."""

    name: str
    group: str
    target: ExportTarget

    @property
    def path(self) -> str:
        """Where it is set."""
        return f"export.{self.group}.{self.name}"
