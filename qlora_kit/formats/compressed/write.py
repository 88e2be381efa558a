"""compressed-tensors: the source folder with its tensors in place.

W4A16, W8A16 and FP8_DYNAMIC are made here, experts one by one (`packed.py`, `fp8_rows.py`). For the other schemes, and
for an FP8 key-value cache, llmcompressor chooses the numbers.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core import extras
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.export.changed import Replacements, changed_tensors
from qlora_kit.export.group_sizes import WHOLE_ROW, check_group_size, divides, linear_input_widths
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.compressed import EXTRA
from qlora_kit.formats.compressed.entry import OUTPUT_HEAD
from qlora_kit.formats.compressed.fp8_rows import write_fp8_rows
from qlora_kit.formats.compressed.packed import write_packed
from qlora_kit.schema.export import CompressedScheme, CompressedTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What vLLM's kernels take.
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
ROUNDED_WITH_FEEDBACK = (CompressedScheme.W4A16, CompressedScheme.W8A16, CompressedScheme.W8A8)
LOOKS_AT_NO_ROWS = (CompressedScheme.FP8_DYNAMIC, CompressedScheme.NVFP4A16, CompressedScheme.MXFP4)
# Weights that share a scale where the scheme itself says so.
FIXED_GROUPS = {CompressedScheme.NVFP4: 16, CompressedScheme.NVFP4A16: 16, CompressedScheme.MXFP4: 32}
# Readers hold these scales in the dtype of the activations.
SCALES_AS_ACTIVATIONS = (CompressedScheme.W4A16, CompressedScheme.W8A16)
# The library turns it off for the whole process; nothing here tokenizes.
TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def needs_calibration(target: CompressedTarget) -> bool:
    """Whether the scheme looks at activations."""
    return target.kv_cache_fp8 or target.scheme not in LOOKS_AT_NO_ROWS


def write_compressed(
    model_dir: Path, out_dir: Path, target: CompressedTarget, calibration: Sequence[Sequence[int]]
) -> Uncalibrated | None:
    """Quantize a merged 16-bit model folder with llmcompressor, on a GPU when there is one.

    Integer weights are rounded by GPTQ (Frantar et al. 2022); W8A8 first moves outliers of the activations into the
    weights (SmoothQuant, Xiao et al. 2022). The output head stays as it is.

    Args:
        out_dir: an existing, empty folder.
        calibration: token-id rows, already rendered with the chat template; FP8_DYNAMIC, NVFP4A16 and MXFP4 do
            without, unless the key-value cache's scales are wanted.

    Returns:
        what the rows told nothing of; None where llmcompressor looks at them, or nothing does.

    Raises:
        RecipeError: the group size does not fit the scheme or the model, no calibration rows where they are needed,
            layers that SmoothQuant is not known for, or llmcompressor is not installed.
        RunError: llmcompressor left every layer as it was.
    """
    rows = [list(row) for row in calibration if len(row)]
    _check(model_dir, target)
    if not rows and needs_calibration(target):
        what = "an fp8 key-value cache" if target.kv_cache_fp8 else target.scheme.value
        raise RecipeError(f"{what} needs calibration rows and got none")
    with _environment_restored(TOKENIZER_THREADS):
        return _write(model_dir, out_dir, target, rows)


def _write(model_dir: Path, out_dir: Path, target: CompressedTarget, rows: list[list[int]]) -> Uncalibrated | None:
    extras.require("llmcompressor", "compressed-tensors export", EXTRA)
    if target.takes_experts and target.scheme is CompressedScheme.FP8_DYNAMIC:
        write_fp8_rows(model_dir, out_dir)
        return None
    if target.takes_experts:
        return write_packed(model_dir, out_dir, target, rows)
    with tempfile.TemporaryDirectory(prefix=".compressed-", dir=out_dir) as work:
        made = Path(work) / "quantized"
        with _quiet():
            _quantize(model_dir, made, target, rows)
        quantization = read_json(made / "config.json")["quantization_config"]
        marks = ("weight_scale", "weight_packed")
        replaced = changed_tensors(model_dir, made, marks)
        if not _moves_outliers(target):
            # What the library computes with, such as norms with the one added, comes back rounded.
            replaced = {source: new for source, new in replaced.items() if set(new) != {source}}
        rewrite_checkpoint(model_dir, out_dir, _in_readers_dtype(model_dir, replaced, target.scheme), quantization)
    return None


def _moves_outliers(target: CompressedTarget) -> bool:
    return target.scheme is CompressedScheme.W8A8 and target.smoothing != 0


def _check(model_dir: Path, target: CompressedTarget) -> None:
    scheme, widths = target.scheme, linear_input_widths(read_json(model_dir / "config.json"))
    if scheme is CompressedScheme.W4A16:
        if target.group_size not in GROUP_SIZES:
            choices = " | ".join(map(str, GROUP_SIZES))
            what = f"readers of W4A16 files take groups of {choices}, not {target.group_size}"
            raise RecipeError(what, where="group_size", fix=f"group_size: {choices}")
        # The kit's own writer leaves a few layers that it does not divide as they are, and looks itself.
        looked_at_later = target.takes_experts and any(divides(target.group_size, width) for width in widths.values())
        if not looked_at_later and (problem := check_group_size(target.group_size, widths)):
            raise RecipeError([problem])
    size = FIXED_GROUPS.get(scheme)
    for module, width in widths.items():
        if size and width % size:
            what = f"{scheme.value} has groups of {size} weights, which do not divide in_features={width} of '{module}'"
            raise RecipeError(what, where="scheme", fix="scheme: FP8_DYNAMIC")


def _quantize(model_dir: Path, made: Path, target: CompressedTarget, rows: list[list[int]]) -> None:
    import torch
    from llmcompressor import oneshot, reset_session
    from transformers import AutoModelForCausalLM

    from qlora_kit.model.load import quiet_libraries

    quiet_libraries()
    on_gpu, calibrated = torch.cuda.is_available(), needs_calibration(target)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        # Most CPUs multiply bfloat16 many times slower; where nothing is multiplied, half the memory is worth more.
        dtype=torch.float32 if calibrated and not on_gpu else "auto",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    data = {"dataset": _loader(rows), "num_calibration_samples": len(rows)} if calibrated else {}
    try:
        oneshot(model=model, recipe=_modifiers(model, target), **data)
        model.save_pretrained(made, save_compressed=True)
    finally:
        # The session is the library's own global, and would hold the model.
        reset_session()


def _loader(rows: list[list[int]]) -> Any:
    import torch
    from torch.utils.data import DataLoader

    batches = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows
    ]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is all that it needs


def _modifiers(model: "PreTrainedModel", target: CompressedTarget) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    from qlora_kit.model.direct_reads import initialized_directly

    scheme = target.scheme
    layers: dict[str, Any] = {"ignore": [OUTPUT_HEAD, *initialized_directly(model)]}
    if target.kv_cache_fp8:
        layers["kv_cache_scheme"] = KV_CACHE
    if scheme is CompressedScheme.W4A16:  # with scales for an FP8 key-value cache
        layers["config_groups"] = {"group_0": _integer_scheme(4, target.group_size)}
    elif scheme is CompressedScheme.W8A16:
        # The library's own has groups of 128, which do not divide every width.
        layers["config_groups"] = {"group_0": _integer_scheme(8, WHOLE_ROW)}
    else:
        layers |= {"targets": ["Linear"], "scheme": scheme.value}
    if scheme not in ROUNDED_WITH_FEEDBACK:
        return [QuantizationModifier(**layers)]
    if not _moves_outliers(target):
        return [GPTQModifier(**layers)]
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    smooth = SmoothQuantModifier(smoothing_strength=target.smoothing, mappings=smoothed_layers(names))
    return [smooth, GPTQModifier(**layers)]


def _integer_scheme(bits: int, group_size: int) -> dict[str, object]:
    whole_row = group_size == WHOLE_ROW
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else group_size,
    }
    return {"targets": ["Linear"], "weights": weights}


def smoothed_layers(module_names: set[str]) -> list[tuple[list[str], str]]:
    """Pairs of linear layers and the norm whose output they read, as patterns of llmcompressor.

    Where norms stand around attention, the library's own table names the one after it, whose output no linear layer
    reads.

    Args:
        module_names: last parts of the names of a model's modules.

    Raises:
        RecipeError: the model has other layers than are known here.
    """
    attention = module_names & {"q_proj", "k_proj", "v_proj", "qkv_proj"}
    mlp = module_names & {"gate_proj", "up_proj", "gate_up_proj"}
    before_mlp = "pre_feedforward_layernorm"
    before_mlp = before_mlp if before_mlp in module_names else "post_attention_layernorm"
    if not attention or not mlp or not {"input_layernorm", before_mlp} <= module_names:
        raise RecipeError(
            "W8A8 moves outliers between norms and the layers after them, and this model's are not known",
            where="smoothing",
            fix="smoothing: 0",
        )
    pairs = ((attention, "input_layernorm"), (mlp, before_mlp))
    return [([rf"re:.*\.{layer}$" for layer in sorted(layers)], rf"re:.*\.{norm}$") for layers, norm in pairs]


def _in_readers_dtype(model_dir: Path, replaced: Replacements, scheme: CompressedScheme) -> Replacements:
    if scheme not in SCALES_AS_ACTIVATIONS:
        return replaced
    import torch

    stored = read_json(model_dir / "config.json")
    dtype = getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype") or "bfloat16"))
    return {
        source: {name: tensor.to(dtype) if _is_weight_scale(name) else tensor for name, tensor in new.items()}
        for source, new in replaced.items()
    }


def _is_weight_scale(name: str) -> bool:
    return name.endswith(".weight_scale")


@contextlib.contextmanager
def _environment_restored(name: str) -> Iterator[None]:
    before = os.environ.get(name)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log and its warnings from the console; its progress bars stay."""
    from loguru import logger

    names = ("llmcompressor", "compressed_tensors")
    for name in names:
        logger.disable(name)
    try:
        with warnings.catch_warnings():
            # Its sequential pass keeps layers apart; transformers warns that they take memory when they are saved.
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            yield
    finally:
        for name in names:
            logger.enable(name)
