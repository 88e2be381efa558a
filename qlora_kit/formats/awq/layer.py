"""Quantizing one layer of a model: scale, check, shrink ranges, round, pack."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qlora_kit.export.error_compensation import compensated_codes
from qlora_kit.export.grid import Grid, decode
from qlora_kit.export.layer_inputs import ActivationStats
from qlora_kit.export.quantize_layers import LayerAtWork, QuantizedLayer
from qlora_kit.formats.awq.folding import (
    CHAINS,
    divide_norm,
    divide_rows,
    multiply_columns,
    shared_over_heads,
    spread_over_heads,
)
from qlora_kit.formats.awq.layout import PACK
from qlora_kit.formats.awq.search import channel_scales, clipped_grid
from qlora_kit.formats.awq.settings import Settings
from qlora_kit.model.unfused_experts import UnfusedExperts

# How much a layer's output may move, relative to its size, when scales are folded: float32 rounding, no more.
SAME_FUNCTION = 1e-3
MOST_SEARCHED = 16  # matrices that scales are chosen by; hundreds of experts read one input


def quantize_layer(at_work: LayerAtWork, settings: Settings) -> QuantizedLayer:
    """Quantize the linear layers of a layer in place, and give the packed tensors."""
    made = QuantizedLayer()
    for reading in at_work.readings:
        if not _fold_norm(at_work, reading, settings, made):
            _fold_chain(at_work, reading, settings, made)
    for reading in at_work.readings:
        names = [name for name in reading.linears if _is_quantized(at_work, name, settings)]
        packed = _quantize_linears(_linears(at_work.layer, names), reading.moment, settings)
        made.linears |= dict(zip(names, packed, strict=True))
    return made


def _is_quantized(at_work: LayerAtWork, name: str, settings: Settings) -> bool:
    """Whether a layer becomes packed."""
    return name in at_work.linears and settings.takes(*at_work.linears[name].shape)


def _linears(layer: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    return [module for name in names if isinstance(module := layer.get_submodule(name), nn.Linear)]


def _search(reading: ActivationStats, weights: Sequence[Tensor], magnitude: Tensor, settings: Settings) -> Tensor:
    return channel_scales(
        weights[:: -(-len(weights) // MOST_SEARCHED)],
        magnitude,
        reading.moment,
        bits=settings.bits,
        group_size=settings.group(len(magnitude)),
        zero_point=settings.zero_point,
    )


def _fold_norm(at_work: LayerAtWork, reading: ActivationStats, settings: Settings, made: QuantizedLayer) -> bool:
    """Move scales between a norm and everything that reads it; whether that was done."""
    if reading.norm is None:
        return False
    norm = at_work.layer.get_submodule(reading.norm)
    readers = _readers(at_work.layer, reading)
    packed = [name for name in readers if _is_quantized(at_work, name, settings)]
    changed = [f"{reading.norm}.{name}" for name, _ in norm.named_parameters()]
    # The others of its readers keep 16 bits, and their weights change with it.
    changed += [f"{name}.weight" for name in readers if name not in packed and not _is_part(at_work, name)]
    if not packed or norm.get_parameter("weight").shape != reading.magnitude.shape:
        return False
    if not all(at_work.can_store(name) for name in changed):
        return False
    scales = _search(reading, [readers[name].get_parameter("weight") for name in packed], reading.magnitude, settings)

    def fold() -> Tensor:
        factors = divide_norm(norm, scales, at_work.stored)
        multiply_columns(list(readers.values()), factors)
        return factors

    factors = _keep_if_same([norm, *readers.values()], fold, at_work.run)
    if factors is None:
        return False
    made.changed |= {name: at_work.layer.get_parameter(name).detach() for name in changed}
    for other in at_work.readings:
        if other is reading or not readers.keys().isdisjoint(other.linears):
            other.moment = other.moment / factors / factors[:, None]
    return True


def _readers(layer: nn.Module, reading: ActivationStats) -> dict[str, nn.Module]:
    """The modules with a matrix [out_features, in_features] that read an input, by name; of experts all."""
    found = {name: layer.get_submodule(name) for name in reading.linears}
    for name in reading.others:
        module = layer.get_submodule(name)
        if isinstance(module, UnfusedExperts):
            found |= {f"{name}.{inner}": linear for inner, linear in module.readers()}
        else:
            found[name] = module
    return found


def _is_part(at_work: LayerAtWork, name: str) -> bool:
    return name in at_work.linears and at_work.linears[name].part is not None


def _fold_chain(at_work: LayerAtWork, reading: ActivationStats, settings: Settings, made: QuantizedLayer) -> None:
    """Move scales between a linear layer and the one before it, whose outputs it reads channel by channel."""
    if (maker_name := _maker(at_work, reading, settings)) is None:
        return
    maker, linear = _linears(at_work.layer, [maker_name, *reading.linears])
    owner = at_work.layer.get_submodule(maker_name.rpartition(".")[0])
    head_dim = int(getattr(owner, "head_dim", 0) or maker.out_features)
    if linear.in_features % maker.out_features or maker.out_features % head_dim:
        return
    shared = shared_over_heads(reading.magnitude, maker.out_features, head_dim)
    magnitude = spread_over_heads(shared, linear.in_features, head_dim)
    scales = _search(reading, [linear.weight], magnitude, settings)

    def fold() -> Tensor:
        divide_rows(maker, shared_over_heads(scales, maker.out_features, head_dim))
        multiply_columns([linear], scales)
        return scales

    experts = _experts_of(at_work.layer, maker_name)
    if experts is not None and experts.scales_with_up:  # the row that would show it may not reach this expert
        fold()
    elif experts is not None or _keep_if_same([maker, linear], fold, at_work.run) is None:
        return
    reading.moment = reading.moment / scales / scales[:, None]
    if maker.bias is not None and not _is_part(at_work, maker_name):
        made.changed[f"{maker_name}.bias"] = maker.bias.detach()


def _maker(at_work: LayerAtWork, reading: ActivationStats, settings: Settings) -> str | None:
    """The quantized layer whose outputs a quantized layer alone reads, if its bias can change too."""
    if len(reading.linears) != 1 or reading.others or not _is_quantized(at_work, reading.linears[0], settings):
        return None
    block, _, name = reading.linears[0].rpartition(".")
    for first, second in CHAINS:
        maker = f"{block}.{first}" if block else first
        if name == second and _is_quantized(at_work, maker, settings):
            has_bias = at_work.layer.get_submodule(maker)._parameters.get("bias") is not None
            return maker if not has_bias or _is_part(at_work, maker) or at_work.can_store(f"{maker}.bias") else None
    return None


def _experts_of(layer: nn.Module, name: str) -> UnfusedExperts | None:
    """The mixture whose expert holds a linear layer, if one does."""
    owner = name.rsplit(".", 2)[0] if name.count(".") > 1 else ""
    module = layer.get_submodule(owner)
    return module if isinstance(module, UnfusedExperts) else None


def _keep_if_same(modules: Sequence[nn.Module], fold: Callable[[], Tensor], run: Callable[[], Tensor]) -> Tensor | None:
    """Fold; if the layer then computes something else, undo it."""
    before = run()
    saved = [{name: value.detach().clone() for name, value in module.state_dict().items()} for module in modules]
    factors = fold()
    moved = (run() - before).norm() / before.norm().clamp(min=1e-12)
    if bool(moved < SAME_FUNCTION):
        return factors
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)
    return None


def _quantize_linears(linears: Sequence[nn.Linear], moment: Tensor, settings: Settings) -> list[dict[str, Tensor]]:
    """Round layers that read one input, as if they were one; afterwards they compute with the rounded weights."""
    if not linears:
        return []
    grids = [
        clipped_grid(
            linear.weight.detach(),
            moment,
            bits=settings.bits,
            group_size=settings.group(linear.in_features),
            zero_point=settings.zero_point,
        )
        for linear in linears
    ]
    whole = Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]), settings.bits)
    codes = compensated_codes(torch.cat([linear.weight.detach() for linear in linears]), moment, whole)
    apart = torch.split(codes, [linear.out_features for linear in linears])
    packed = []
    for linear, grid, part in zip(linears, grids, apart, strict=True):
        linear.weight.data = decode(part, grid)
        packed.append(PACK[settings.layout](part, grid.scale, grid.zero))
    return packed
