"""The layers of a model, one at a time: widened, observed, quantized and let go of, for a quantizer that calibrates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.core.console.bar import each
from qlora_kit.export.layer_inputs import ActivationStats, decoder_layers, first_inputs, layer_stats, run_layer
from qlora_kit.export.stored_linears import StoredLinear, StoredLinears, stored_linears
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.model.language_model import load_language_model
from qlora_kit.model.stored_names import stored_names
from qlora_kit.model.unfused_experts import UnfusedExperts, unfuse_experts
from qlora_kit.weights.headers import read_headers


@dataclass(frozen=True)
class LayerAtWork:
    """A layer at hand.

    Attributes:
        name: of the layer in the model.
        layer: in float32, experts apart; what is changed in it is what it computes for the layers after it.
        linears: those inside it that can be quantized, by their name within the layer.
        readings: what they saw, an entry for each distinct input; none for layers that no row reached.
        run: the layer's output on one row.
        can_store: whether the folder has a place for a parameter of the layer as it is, by its name within the layer.
        stored: dtype of 16-bit weights in the folder.
    """

    name: str
    layer: nn.Module
    linears: Mapping[str, StoredLinear]
    readings: Sequence[ActivationStats]
    run: Callable[[], Tensor]
    can_store: Callable[[str], bool]
    stored: torch.dtype


@dataclass
class QuantizedLayer:
    """A layer's new tensors, named within the layer: those of linears by kind, and other weights that changed."""

    linears: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class QuantizedModel:
    """What was made of a folder.

    Attributes:
        found: the folder's layers.
        replacements: the folder's tensors, each with the tensors (on the CPU) that replace it.
        left: names in the folder of modules that stay in 16 bit.
        unseen: names of quantized layers that no calibration row reached.
    """

    found: StoredLinears
    replacements: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def uncalibrated(self) -> Uncalibrated:
        """The same in numbers."""
        return Uncalibrated(len(self.unseen), sum(one.is_expert for one in self.found.linears))


def quantize_layers(
    model_dir: Path,
    calibration: Sequence[Sequence[int]],
    quantize: Callable[[LayerAtWork], QuantizedLayer],
    *,
    title: str,
    follows: bool,
) -> QuantizedModel:
    """Quantize a merged 16-bit folder layer by layer, on a GPU where there is one.

    Args:
        quantize: makes a layer's new tensors, and puts what they stand for in the layer.
        title: of the bar.
        follows: whether the next layer is shown what the quantized one gives, instead of what the 16-bit one gives.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(model_dir, dtype="auto").eval()
    stored = model.dtype  # it is widened below
    found = stored_linears(model, stored_names(model_dir, read_headers(model_dir)))
    prefix, layers = decoder_layers(model)
    calls = first_inputs(model, calibration, device)
    done = QuantizedModel(found, left=[*found.otherwise, *found.kept, *found.towers])
    for index in each(range(len(layers)), title, "layer"):
        # Widened where it lies then: in one step, torch would widen it on the CPU and carry twice the bytes.
        name, layer = f"{prefix}.{index}", layers[index].to(device).to(torch.float32)
        unfuse_experts(layer, name, found.splits_gate)
        readings, outputs = layer_stats(layer, calls, index)
        linears = found.inside(name)
        unseen = _unseen_experts(layer, linears, readings)
        at_work = LayerAtWork(
            name=name,
            layer=layer,
            linears=linears,
            readings=[*readings, *unseen],
            run=partial(run_layer, layer, calls[0], index),
            can_store=partial(_has_place, found, name),
            stored=stored,
        )
        _add(done, at_work, quantize(at_work))
        done.unseen += [linears[inner].name for reading in unseen for inner in reading.linears]
        for call, output in zip(calls, outputs, strict=True):
            call.hidden = run_layer(layer, call, index) if follows else output
        layers[index] = nn.Identity()
    return done


def _has_place(found: StoredLinears, layer: str, inner: str) -> bool:
    return f"{layer}.{inner}" in found.names


def _unseen_experts(
    layer: nn.Module, linears: Mapping[str, StoredLinear], readings: Sequence[ActivationStats]
) -> list[ActivationStats]:
    """What stands for inputs of experts that no row reached: channels of one size that know nothing of each other."""
    seen = {name for reading in readings for name in reading.linears}
    device = next(layer.parameters()).device
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, UnfusedExperts):
            inside = [inner for inner in linears if inner.startswith(f"{name}.") and inner not in seen]
            widths = {inner: linears[inner].shape[1] for inner in inside}
            found += [
                ActivationStats([inner], None, torch.ones(width, device=device), torch.eye(width, device=device))
                for inner, width in widths.items()
            ]
    return found


def _add(done: QuantizedModel, at_work: LayerAtWork, made: QuantizedLayer) -> None:
    for inner, linear in at_work.linears.items():
        tensors = {f"{linear.name}.{kind}": tensor for kind, tensor in made.linears.get(inner, {}).items()}
        done.left += [] if tensors else [linear.name]
        if linear.part is not None:
            # Its neighbors leave the tensor that held them all, so it needs a place of its own either way.
            module = at_work.layer.get_submodule(inner)
            assert isinstance(module, nn.Linear)
            tensors = tensors or {f"{linear.name}.weight": module.weight.detach().to("cpu", at_work.stored)}
            if module.bias is not None:
                bias = {f"{linear.name}.bias": module.bias.detach().to("cpu", at_work.stored)}
                done.replacements.setdefault(linear.bias, {}).update(bias)
        if tensors:
            done.replacements.setdefault(linear.weight, {}).update(tensors)
    for inner, tensor in made.changed.items():
        name = done.found.names[f"{at_work.name}.{inner}"]
        done.replacements[name] = {name: tensor.detach().to("cpu", at_work.stored)}
