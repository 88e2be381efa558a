"""Quantizing one layer of a model: scale, check, shrink ranges, round, pack."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_kit.export.error_compensation import compensated_codes
from qlora_kit.export.grid import Grid, decode
from qlora_kit.export.layer_inputs import ActivationStats
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
from qlora_kit.schema.export import AwqLayout

# How much a layer's output may move, relative to its size, when scales are folded: float32 rounding, no more.
SAME_FUNCTION = 1e-3


@dataclass(frozen=True)
class Settings:
    """How to quantize: code bits, inputs per group (-1: all of them), whether zero is a code of its own, the layout."""

    bits: int
    group_size: int
    zero_point: bool
    layout: AwqLayout = AwqLayout.gemm

    def group(self, width: int) -> int:
        """Inputs per group of a linear module that reads `width`."""
        return width if self.group_size == -1 else self.group_size


@dataclass
class Quantized:
    """A layer's new tensors, named within the layer: those of linears, and the other weights that folding changed."""

    linears: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


def quantize_layer(
    layer: nn.Module,
    readings: Sequence[ActivationStats],
    run: Callable[[], Tensor],
    settings: Settings,
    *,
    skip: AbstractSet[str] = frozenset(),
    stored: torch.dtype,
    head_dim: int,
) -> Quantized:
    """Quantize every linear layer that was read, in place, and give the packed tensors.

    Args:
        layer: in float32; afterwards it computes with the quantized weights.
        run: runs the layer on one row of calibration data.
        skip: linear layers that keep their weights.
        stored: dtype of the unquantized weights in the file.
    """
    result = Quantized()
    for reading in readings:
        if not skip.isdisjoint(reading.linears):
            continue
        factors = _fold_norm(layer, reading, run, settings, stored, result)
        factors = factors if factors is not None else _fold_chain(layer, reading, run, settings, head_dim, skip)
        if factors is not None:
            reading.moment = reading.moment / factors / factors[:, None]
    for reading in readings:
        names = [name for name in reading.linears if name not in skip]
        packed = _quantize_linears(_linears(layer, names), reading.moment, settings)
        result.linears |= dict(zip(names, packed, strict=True))
    return result


def _linears(layer: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    return [module for name in names if isinstance(module := layer.get_submodule(name), nn.Linear)]


def _search(reading: ActivationStats, linears: Sequence[nn.Linear], magnitude: Tensor, settings: Settings) -> Tensor:
    return channel_scales(
        [linear.weight.detach() for linear in linears],
        magnitude,
        reading.moment,
        bits=settings.bits,
        group_size=settings.group(len(magnitude)),
        zero_point=settings.zero_point,
    )


def _fold_norm(
    layer: nn.Module,
    reading: ActivationStats,
    run: Callable[[], Tensor],
    settings: Settings,
    stored: torch.dtype,
    result: Quantized,
) -> Tensor | None:
    if reading.norm is None:
        return None
    norm, linears = layer.get_submodule(reading.norm), _linears(layer, reading.linears)
    scales = _search(reading, linears, reading.magnitude, settings)

    def fold() -> Tensor:
        factors = divide_norm(norm, scales, stored)
        multiply_columns(linears, factors)
        return factors

    factors = _keep_if_same([norm, *linears], fold, run)
    if factors is not None:
        result.changed |= {f"{reading.norm}.{name}": value for name, value in _snapshot(norm, stored).items()}
    return factors


def _snapshot(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", dtype) for name, value in module.named_parameters()}


def _fold_chain(
    layer: nn.Module,
    reading: ActivationStats,
    run: Callable[[], Tensor],
    settings: Settings,
    head_dim: int,
    skip: AbstractSet[str],
) -> Tensor | None:
    maker_name = _maker(layer, reading)
    if maker_name is None or maker_name in skip:
        return None
    maker, (linear,) = layer.get_submodule(maker_name), _linears(layer, reading.linears)
    if not isinstance(maker, nn.Linear) or linear.in_features % maker.out_features:
        return None
    shared = shared_over_heads(reading.magnitude, maker.out_features, head_dim)
    magnitude = spread_over_heads(shared, linear.in_features, head_dim)
    scales = _search(reading, [linear], magnitude, settings)

    def fold() -> Tensor:
        divide_rows(maker, shared_over_heads(scales, maker.out_features, head_dim))
        multiply_columns([linear], scales)
        return scales

    return _keep_if_same([maker, linear], fold, run)


def _maker(layer: nn.Module, reading: ActivationStats) -> str | None:
    if len(reading.linears) != 1:
        return None
    block, _, name = reading.linears[0].rpartition(".")
    names = {module_name for module_name, _ in layer.named_modules()}
    for first, second in CHAINS:
        candidate = f"{block}.{first}" if block else first
        if name == second and candidate in names:
            return candidate
    return None


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
