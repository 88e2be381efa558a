"""The model that was trained, as it was trained: what every file of it is compared with."""

from pathlib import Path

import torch

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.model.device import this_device
from qlora_kit.model.load import load_base
from qlora_kit.schema.quant import QuantConfig, QuantKind


def open_trained(
    base_folder: Path, adapter: Path, quant: QuantConfig, pad_token_id: int
) -> tuple[TorchScorer, TorchScorer]:
    """The trained model (quantized base + adapter), and the same base without its adapter.

    Activations are fp32, so that what is measured against it is the file's error and not the reference's rounding.
    """
    base = load_base(base_folder, quant, compute_dtype=torch.float32)
    if this_device().type == "cpu" and quant.kind is not QuantKind.none:
        # The same weights, unpacked once and not at every step; a GPU may lack the memory and does not need it.
        base = base.dequantize().to(torch.float32)
    model = load_adapter(base, adapter)
    return TorchScorer(model, pad_token_id), TorchScorer(model, pad_token_id, model.disable_adapter)
