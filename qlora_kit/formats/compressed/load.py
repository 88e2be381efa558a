"""compressed-tensors folders, loaded the way a user of transformers loads them."""

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import is_present, missing_extra
from qlora_kit.core.files import read_json
from qlora_kit.formats.compressed import EXTRA
from qlora_kit.formats.unpacked_folders import load_unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "compressed-tensors"


def load_compressed(folder: Path) -> "PreTrainedModel":
    """Load a compressed-tensors folder through transformers, ready to score.

    Weights are unpacked once; activations, and a key-value cache where the file has scales for it, are rounded at
    every step as a server's kernels round them. On a GPU in the file's dtype, on a CPU in float32.

    Raises:
        RecipeError: compressed-tensors is not installed.
        RunError: the folder is of another kind, or its weights cannot be loaded.
    """
    path = folder / "config.json"
    method = str(read_json(path).get("quantization_config", {}).get("quant_method", "none")) if path.exists() else ""
    if method != METHOD:
        raise RunError(f"{folder} is not a compressed-tensors folder: it names the quantization '{method}'")
    if not is_present("compressed_tensors"):
        raise missing_extra("llmcompressor", "Loading compressed-tensors files", EXTRA)
    from transformers import CompressedTensorsConfig

    try:
        # Unpacking draws a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            return load_unpacked(folder, CompressedTensorsConfig(dequantize=True))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"transformers could not load the compressed-tensors folder {folder}: {error}") from error
