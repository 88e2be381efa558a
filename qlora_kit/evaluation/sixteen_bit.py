"""16-bit folders, loaded the way a user of transformers loads them."""

from pathlib import Path
from typing import Any

import torch

from qlora_kit.model.device import this_device
from qlora_kit.model.language_model import load_language_model


def load_sixteen_bit(folder: Path) -> Any:
    """The model of a 16-bit folder, on a GPU in bfloat16, on a CPU in float32."""
    device = this_device()
    # Most CPUs multiply bf16 many times slower than fp32; the weights are the same bf16 values either way.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_language_model(folder, dtype=dtype, device=device)
