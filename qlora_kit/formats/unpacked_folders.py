"""Folders whose weights transformers unpacks while it loads them."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


def load_unpacked(folder: Path, unpacking: "QuantizationConfigMixin") -> "PreTrainedModel":
    """Load a folder, its weights unpacked once: on a GPU in the file's dtype, on a CPU in float32.

    Args:
        unpacking: the library's settings for the folder's kind, with `dequantize`.

    Raises:
        OSError, RuntimeError, ValueError, KeyError: transformers cannot load it.
    """
    import torch

    from qlora_kit.model.language_model import load_language_model

    on_gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        # Asking to unpack makes transformers warn that nothing else of what is asked counts.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = load_language_model(
            folder,
            dtype="auto" if on_gpu else torch.float32,
            device="cuda:0" if on_gpu else "cpu",
            quantization=unpacking,
        )
    # 4-bit floats unpack to bfloat16 whatever was asked for; so do FP8 blocks from transformers 5.23 on.
    return (model if on_gpu else model.float()).eval()
