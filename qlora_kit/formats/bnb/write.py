"""bitsandbytes: 4-bit NF4 or int8 weights as they lie in memory, loaded without quantizing again."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json
from qlora_kit.export.changed import changed_tensors
from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.schema.export import BnbKind, BnbTarget
from qlora_kit.schema.quant import QuantConfig, QuantKind

# What only a quantized layer has: the block scales of NF4, the row scales of int8.
MARKS = {BnbKind.nf4: "weight.absmax", BnbKind.int8: "SCB"}
# What readers need of the settings; the rest says how this process was started.
_INT8_SETTINGS = ("llm_int8_", "load_in_")


def write_bnb(model_dir: Path, out_dir: Path, target: BnbTarget) -> None:
    """Quantize a merged 16-bit model folder with bitsandbytes, without calibration; the output head stays as it is.

    NF4 has blocks of 64 weights (Dettmers et al. 2023), int8 rows (Dettmers et al. 2022).

    Args:
        out_dir: an existing, empty folder.

    Raises:
        RunError: bitsandbytes quantized no layer of the model.
    """
    with tempfile.TemporaryDirectory(prefix=".bnb-", dir=out_dir) as work:
        made = Path(work) / "quantized"
        _quantize(model_dir, made, target)
        settings = _portable(read_json(made / "config.json")["quantization_config"])
        rewrite_checkpoint(model_dir, out_dir, changed_tensors(model_dir, made, (MARKS[target.kind],)), settings)


def _quantize(model_dir: Path, made: Path, target: BnbTarget) -> None:
    from qlora_kit.model.load import load_base

    kind = QuantKind.nf4 if target.kind is BnbKind.nf4 else QuantKind.int8
    # Loaded for training, so in the layout that bitsandbytes stores and not in the one that its CPU kernel multiplies.
    model = load_base(model_dir, QuantConfig(kind=kind, double_quant=target.double_quant))
    model.save_pretrained(made)


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    prefixes = _INT8_SETTINGS if settings.get("load_in_8bit") else (*_INT8_SETTINGS, "bnb_")
    kept = {name: value for name, value in settings.items() if name.startswith(prefixes)}
    return {"quant_method": "bitsandbytes", **kept}
