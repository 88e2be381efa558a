"""How far a quantized checkpoint's outputs are from its source's, whatever layout it is stored in."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantize_8b_model import checkpoint_tensors, scored_rows

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


def keep_expected(work: Path, folder: Path) -> None:
    """Store what the source's layers give on the rows for the comparison."""
    from safetensors.torch import save_file

    save_file({"hidden": _hidden(work, folder, {})}, _expected(work, folder))


def output_error(work: Path, folder: Path, made: Path) -> float:
    """|h - h0| / |h0| of the last hidden states, from the weights that the quantized checkpoint stands for.

    Channel scales that were moved from one weight to another cancel out in it. The activations are not quantized.
    """
    from safetensors.torch import load_file

    expected = load_file(_expected(work, folder))["hidden"]
    found = _hidden(work, folder, dense_weights(made))
    return float((found - expected).norm() / expected.norm())


def _expected(work: Path, folder: Path) -> Path:
    return work / f"expected_{folder.name}.safetensors"


def _hidden(work: Path, folder: Path, weights: Tensors) -> "Tensor":
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    # float32: what is compared is the weights, not the arithmetic.
    model = model.to(device).float()
    if weights:
        missing, unexpected = model.load_state_dict({name: value.float() for name, value in weights.items()}, False)
        missing = [name for name in missing if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
        if missing or unexpected:
            raise ValueError(f"the quantized checkpoint lacks {missing[:3]} and has {unexpected[:3]}")
    with torch.no_grad():
        rows = [model.model(input_ids=row[None].to(device)).last_hidden_state for row in scored_rows(work)]
    return torch.cat(rows).float().cpu()


def dense_weights(folder: Path) -> Tensors:
    """The tensors of a checkpoint in GPTQ's, AWQ's or compressed-tensors' layout, with dense weights."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts: dict[str, Tensors] = {}
    for name, tensor in checkpoint_tensors(folder):
        module, _, kind = name.rpartition(".")
        parts.setdefault(module, {})[kind] = tensor.to(device)
    return {f"{module}.{kind}": value for module, own in parts.items() for kind, value in _dense(own).items()}


def _dense(own: Tensors) -> Tensors:
    if "qweight" in own:
        return {"weight": _gptq_or_awq(own)}
    if "weight_packed" in own:
        return {"weight": _packed(own)}
    if "weight_scale" in own:
        return {"weight": own["weight"].float() * own["weight_scale"].float()}
    return own


def _gptq_or_awq(own: Tensors) -> "Tensor":
    from qlora_kit.formats.awq import layout as awq_layout
    from qlora_kit.formats.gptq import layout as gptq_layout

    if "g_idx" in own:
        return gptq_layout.unpacked_weight(own)
    return awq_layout.unpacked_weight(own, len(own["qweight"]) // len(own["scales"]))


def _packed(own: Tensors) -> "Tensor":
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale = own["weight_scale"].float()
    shape = torch.Size(own["weight_shape"].tolist())
    bits = own["weight_packed"].shape[1] * 32 // shape[1]
    codes = unpack_from_int32(own["weight_packed"], bits, shape).float()
    if "weight_zero_point" in own:
        zero = unpack_from_int32(own["weight_zero_point"], bits, scale.shape, packed_dim=0).float()
    else:
        zero = torch.zeros_like(scale)
    width = shape[1] // scale.shape[1]
    weight: Tensor = (codes - zero.repeat_interleave(width, 1)) * scale.repeat_interleave(width, 1)
    return weight
