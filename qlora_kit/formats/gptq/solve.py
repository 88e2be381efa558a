"""GPTQ of one layer of a model."""

from collections.abc import Mapping

from torch import Tensor, nn

from qlora_kit.export.grid import Grid
from qlora_kit.export.quantize_layers import LayerAtWork, QuantizedLayer
from qlora_kit.export.solver import solve
from qlora_kit.formats.gptq.layers import LayerSettings
from qlora_kit.formats.gptq.layout import packed_tensors
from qlora_kit.formats.gptq.rounding import rounded_grid
from qlora_kit.schema.export import GptqTarget


def quantize_layer(at_work: LayerAtWork, plan: Mapping[str, LayerSettings], target: GptqTarget) -> QuantizedLayer:
    """Quantize the linear layers of a layer in place, and give the packed tensors.

    Args:
        plan: the settings of each layer by its name in the folder.
    """
    made = QuantizedLayer()
    for reading in at_work.readings:
        alike: dict[LayerSettings, list[str]] = {}
        for name in reading.linears:
            settings = plan.get(at_work.linears[name].name) if name in at_work.linears else None
            if settings is not None and settings.quantized:
                alike.setdefault(settings, []).append(name)
        for settings, names in alike.items():
            linears = [module for name in names if isinstance(module := at_work.layer.get_submodule(name), nn.Linear)]

            def grid_of(weight: Tensor, shrink: float, settings: LayerSettings = settings) -> Grid:
                return rounded_grid(weight, settings, sym=target.sym, shrink=shrink)

            found = solve(linears, reading.moment, grid_of, damping=target.damping, by_energy=target.desc_act)
            packed = [packed_tensors(one.codes, one.grid, one.group) for one in found]
            made.linears |= dict(zip(names, packed, strict=True))
    return made
