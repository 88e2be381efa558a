"""Quantizing a whole model: one layer widened, quantized and dropped at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.core.console.bar import each
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.export.group_sizes import check_group_size
from qlora_kit.export.layer_inputs import Call, decoder_layers, first_inputs, layer_stats, run_layer
from qlora_kit.formats.awq.layer import Quantized, Settings, quantize_layer
from qlora_kit.formats.awq.layout import OUTPUTS_AT_ONCE


def quantized_tensors(
    model_dir: Path, settings: Settings, calibration: Sequence[Sequence[int]]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Every tensor of a checkpoint that quantizing changes, and the linear layers that stay in 16 bits.

    Returns:
        source tensor name to the tensors that replace it (on the CPU), and full module names. Left in 16 bits are
        layers whose outputs do not fill what the kernels take at once, and layers that no calibration row reaches.

    Raises:
        RecipeError: the group size does not divide a layer's inputs.
    """
    from qlora_kit.model.language_model import load_language_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(model_dir, dtype="auto").eval()
    stored, head_dim = model.dtype, _head_dim(model_dir)
    prefix, layers = decoder_layers(model)
    _check_group_size(prefix, layers, settings)
    calls = first_inputs(model, calibration, device)
    replacements: dict[str, dict[str, Tensor]] = {}
    left_out: list[str] = []
    for index in each(range(len(layers)), "AWQ", "layer"):
        # Widened where it lies then: in one step, torch would widen it on the CPU and carry twice the bytes.
        name, layer = f"{prefix}.{index}", layers[index].to(device).to(torch.float32)
        found = _advance(layer, calls, index, settings, stored, head_dim)
        replacements |= dict(_named(name, found))
        left_out += [f"{name}.{linear}" for linear, _ in _linears(layer) if linear not in found.linears]
        layers[index] = nn.Identity()
    return replacements, left_out


def _advance(
    layer: nn.Module, calls: Sequence[Call], index: int, settings: Settings, stored: torch.dtype, head_dim: int
) -> Quantized:
    readings, outputs = layer_stats(layer, calls, index)
    at_once = OUTPUTS_AT_ONCE[settings.layout]
    # Experts are one parameter, but for libraries that take them apart once they are imported: here they never count.
    skip = frozenset(
        name for name, linear in _linears(layer) if linear.out_features % at_once or "experts" in name.split(".")
    )

    def run() -> Tensor:
        return run_layer(layer, calls[0], index)

    found = quantize_layer(layer, readings, run, settings, skip=skip, stored=stored, head_dim=head_dim)
    for call, output in zip(calls, outputs, strict=True):
        call.hidden = output
    return found


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


def _named(layer: str, found: Quantized) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for linear, tensors in found.linears.items():
        name = f"{layer}.{linear}"
        yield f"{name}.weight", {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    for changed, tensor in found.changed.items():
        yield f"{layer}.{changed}", {f"{layer}.{changed}": tensor}


def _check_group_size(prefix: str, layers: nn.ModuleList, settings: Settings) -> None:
    widths = {f"{prefix}.*.{name}": linear.in_features for layer in layers for name, linear in _linears(layer)}
    if problem := check_group_size(settings.group_size, widths):
        raise RecipeError([problem])


def _head_dim(model_dir: Path) -> int:
    config = read_json(model_dir / "config.json")
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
