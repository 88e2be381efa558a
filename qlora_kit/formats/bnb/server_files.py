"""What servers require of the settings of a bitsandbytes folder."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.evaluation.servers.requirements import Required

REQUIRED = (Required(("quant_method",), ("bitsandbytes",)),)


def width_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the number of bits."""
    if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        yield "quantization_config says neither load_in_4bit nor load_in_8bit"
    if settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") not in ("nf4", "fp4"):
        yield f"quantization_config: bnb_4bit_quant_type is {settings.get('bnb_4bit_quant_type')}; nf4 and fp4 are read"
