"""What servers require of the settings of a compressed-tensors folder."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.evaluation.servers.requirements import Required

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
REQUIRED = (
    Required(("quant_method",), ("compressed-tensors",)),
    Required(("format",), _FORMATS),
    Required(("config_groups",)),
    Required(("ignore",)),
)


def group_problems(settings: Mapping[str, Any], server: str) -> Iterator[str]:
    """What is wrong with the groups of layers."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield "quantization_config: config_groups is empty, so nothing would be read as quantized"
        return
    for name, group in groups.items():
        if not group.get("targets"):
            yield f"quantization_config: {name} has no targets"
        weights = group.get("weights") or {}
        if weights.get("num_bits") not in (4, 8):
            yield f"quantization_config: {name} has weights of {weights.get('num_bits')} bits; {server} reads 4 and 8"
