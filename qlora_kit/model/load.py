"""Loads a base model, quantized as the recipe says."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.core.console.lines import is_verbose
from qlora_kit.core.errors import DamagedFileError, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.core.shell import shell_line
from qlora_kit.model.device import this_device
from qlora_kit.model.kind import read_config
from qlora_kit.model.language_model import load_language_model
from qlora_kit.model.microscaled import is_microscaled, unpacking
from qlora_kit.model.packed_cache import PackedPlace
from qlora_kit.model.packed_loading import named_plainly, stack_experts, with_experts
from qlora_kit.model.skeleton import skeleton, told_plainly
from qlora_kit.model.stacked_experts import experts_of
from qlora_kit.model.structure import LINEAR, kept_whole
from qlora_kit.schema.model import Attention
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.weights.microscaled import STORED_AS

_TRIED_TOKENS = 8


def torch_dtype(name: ComputeDtype) -> torch.dtype:
    """The torch dtype of a recipe's name."""
    return {
        ComputeDtype.bfloat16: torch.bfloat16,
        ComputeDtype.float16: torch.float16,
        ComputeDtype.float32: torch.float32,
    }[name]


def load_base(
    folder: Path, quant: QuantConfig, attention: Attention | None = None, compute_dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a base from a safetensors folder onto this process's device.

    Args:
        folder: with config.json and safetensors; weights in 16 or 32 bit, or already in bitsandbytes 4 bit.
        quant: storage of the frozen linear weights; ignored where the folder's own storage is the same kind.
        attention: implementation; sdpa where the model has it, else eager, unless given.
        compute_dtype: of activations and of every weight that is not quantized; the recipe's unless given.
    Raises:
        RecipeError: the folder is quantized in another way than the recipe says, the libraries refuse the model, or
            the folder lacks weights of it.
    """
    quiet_libraries()
    dtype = compute_dtype or torch_dtype(quant.compute_dtype)
    stored = check_storage(folder, quant)
    config = read_config(folder)
    kept = kept_whole(skeleton(folder))
    device, quantization = this_device(), _as_loaded(folder, quant, dtype, kept) if stored is None else None
    how = None if attention is None else attention.value
    place = None if quantization is None else PackedPlace.of(folder, quant, dtype, device)
    with told_plainly(folder, config, "load"):
        model = None
        if place is not None and quantization is not None:
            model = place.load(folder, dtype=dtype, device=device, quantization=quantization, attention=how)
        if model is None:
            model = load_language_model(folder, dtype=dtype, device=device, quantization=quantization, attention=how)
            if place is not None:
                place.keep(model)
    if stored is not None:
        _set_compute_dtype(model, dtype)
    named_plainly(model)
    stack_experts(model)
    _name_decoder(model)
    disable_cpu_inference_packing(model)
    return model


def check_storage(folder: Path, quant: QuantConfig) -> QuantKind | None:
    """How a folder's weights are quantized already; None where they are not.

    Raises:
        RecipeError: in another way than the recipe says, or than can be trained.
    """
    stored = _stored_kind(folder)
    if stored is not None and stored is not quant.kind:
        raise RecipeError(
            f"the base in {folder} is stored as {stored.name}, but quant.kind={quant.kind.name}",
            "quant.kind",
            f"quant={'nf4_double' if stored is QuantKind.nf4 else stored.name}",
        )
    return stored


def rounded_names(model: PreTrainedModel, quant: QuantConfig) -> set[str]:
    """Names of the modules of a model without weights whose weights the recipe's loading rounds.

    They are linear, or hold stacks of experts. Asks transformers' own rule.
    """
    wanted = bitsandbytes_config(quant, torch.float32, kept_whole(model))
    if wanted is None:
        return set()
    kept = HfQuantizer.get_modules_to_not_convert(model, wanted.llm_int8_skip_modules, model._keep_in_fp32_modules)
    stacks = experts_of(model) if quant.kind.is_4bit else {}
    return {
        name
        for name, module in model.named_modules()
        if (type(module) in LINEAR or name in stacks) and should_convert_module(name, kept)
    }


def put_4bit_linears(model: PreTrainedModel) -> None:
    """Exchange the linear modules of a model without weights for bitsandbytes' own, in place."""
    replace_with_bnb_linear(model, [], BitsAndBytesConfig(load_in_4bit=True))


def bitsandbytes_config(quant: QuantConfig, dtype: torch.dtype, whole: Sequence[str]) -> BitsAndBytesConfig | None:
    """bitsandbytes' own configuration of a recipe's `quant`; None for a base kept in 16 bit.

    Args:
        whole: names of modules that are never rounded, beside those that the recipe names.
    """
    if quant.kind is QuantKind.none:
        return None
    kept = [*whole, *quant.keep_16bit]
    if quant.kind is QuantKind.int8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=quant.int8_outlier_threshold, llm_int8_skip_modules=kept
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind.value,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _name_decoder(model: PreTrainedModel) -> None:
    """Have `base_model` give the decoder, which TRL takes hidden states from; some classes name another module."""
    if model.base_model is model and isinstance(getattr(model, "model", None), torch.nn.Module):
        model.base_model_prefix = "model"


def _as_loaded(
    folder: Path, quant: QuantConfig, dtype: torch.dtype, whole: Sequence[str]
) -> QuantizationConfigMixin | None:
    microscaled = is_microscaled(read_config(folder))
    config = bitsandbytes_config(quant, dtype, whole)
    if config is None:
        return unpacking() if microscaled else None
    return with_experts(config, microscaled=microscaled) if quant.kind.is_4bit else config


def try_forward(model: PreTrainedModel) -> None:
    """Run a few tokens through a model, so that what a library cannot compute shows before training.

    The model is left in eval mode, as `from_pretrained` leaves it; a trainer puts it into training mode.
    Random draws of the run stay as they are. Kernels that are compiled, or that want 16-bit activations, are left out.
    """
    if (tried := tried_tokens(model)) is None:
        return
    tokens, context = tried
    model.eval()
    with torch.random.fork_rng(), torch.no_grad(), context:
        model(input_ids=tokens, use_cache=False)


def tried_tokens(model: PreTrainedModel) -> "tuple[torch.Tensor, torch.autocast] | None":
    """A row of a few tokens to try a model with, and the autocast of its training; None where it has other attention.

    Returns:
        int64 [1, tokens] on the model's device.
    """
    attention = getattr(model.config, "_attn_implementation", "")
    if attention not in (Attention.sdpa.value, Attention.eager.value):
        return None
    embedding = model.get_input_embeddings()
    tokens = torch.arange(_TRIED_TOKENS, device=embedding.weight.device) % embedding.num_embeddings
    dtype = embedding.weight.dtype
    return tokens[None], torch.autocast(tokens.device.type, dtype, enabled=dtype is not torch.float32)


def disable_cpu_inference_packing(model: torch.nn.Module) -> None:
    """Keep 4-bit weights in the layout that has gradients and can be dequantized.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks `Linear4bit` in place at the first forward in eval mode. From
    then on no gradient passes the layer and `dequantize_4bit` returns noise (bitsandbytes/nn/modules.py).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quiet_libraries() -> None:
    """Silence transformers' notices, unless details are asked for, and its progress bars; the kit has its own."""
    if not is_verbose():
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _stored_kind(folder: Path) -> QuantKind | None:
    path = folder / "config.json"
    stored = read_json(path).get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise DamagedFileError(f"{path}: its quantization_config is not a JSON object", str(path))
    if stored.get("quant_method") == STORED_AS:
        return None  # unpacked while it is loaded, and stored as the recipe says
    if stored.get("quant_method") != "bitsandbytes":
        unpack = shell_line(["qlora-kit", "export", f"base={folder}", "export=merged_16bit"])
        method = stored.get("quant_method")
        what = (
            f"the base in {folder} is quantized with {method}; only bases in 16 bit, by bitsandbytes, or with experts "
            f"in 4-bit floats can be trained as they are; `{unpack}` writes its weights in 16 bit, and an adapter that "
            "is trained on those with quant=none belongs to this base too"
        )
        fix = "model.source=<that folder, or the 16-bit model that both were made from>"
        raise RecipeError(what, "model.source", fix)
    if stored.get("load_in_8bit"):
        return QuantKind.int8
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise DamagedFileError(
            f"{path}: its quantization_config has an unknown bnb_4bit_quant_type, {kind!r}", str(path)
        )
    return QuantKind(kind)


def _set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
    for weight in model.parameters():
        # transformers 5.17 leaves a tensor that it renames in the format of its file.
        if weight.dtype in (torch.bfloat16, torch.float16) and weight.dtype is not dtype:
            weight.data = weight.data.to(dtype)
