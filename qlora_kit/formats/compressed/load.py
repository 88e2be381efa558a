"""compressed-tensors folders, loaded the way a user of transformers loads them."""

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import is_present, missing_extra
from qlora_kit.core.files import read_json
from qlora_kit.formats.compressed import EXTRA, fp8_rows, packed
from qlora_kit.formats.unpacked_folders import Unpacked, load_unpacked, load_weights, names_its_layers
from qlora_kit.weights.reader import stored_tensors, tensor_names, tensors_by_kind, unpacked_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METHOD = "compressed-tensors"


def load_compressed(folder: Path) -> "PreTrainedModel":
    """Load a compressed-tensors folder through transformers, ready to score.

    Weights are unpacked once, of mixtures and of parts of larger models here. Where transformers does it, activations,
    and a key-value cache where the file has scales for it, are rounded at every step as a server's kernels round them.
    On a GPU in the file's dtype, on a CPU in float32.

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

    if is_unpacked_here(folder):
        return load_weights(folder, unpacked_compressed(folder))
    try:
        # Unpacking draws a bar of its own.
        with contextlib.redirect_stderr(io.StringIO()):
            return load_unpacked(folder, CompressedTensorsConfig(dequantize=True))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"transformers could not load the compressed-tensors folder {folder}: {error}") from error


def is_unpacked_here(folder: Path) -> bool:
    """Whether transformers would not find the layers: of mixtures, and of what is a part of a larger model."""
    return not names_its_layers(folder, f".{packed.KINDS[1]}")


def unpacked_compressed(folder: Path) -> Unpacked:
    """The weights that a folder of integers in words, or of FP8 with scales of rows or whole tensors, stands for."""
    read, names = stored_tensors(folder), tensor_names(folder)
    is_packed = any(name.endswith(f".{packed.KINDS[0]}") for name in names)
    kinds = packed.KINDS if is_packed else fp8_rows.KINDS

    def weight(name: str) -> "Tensor | None":
        found = tensors_by_kind(read, name, kinds)
        if found is None:
            return read(name)
        return packed.unpacked_weight(found) if is_packed else found["weight"].float() * found["weight_scale"].float()

    if is_packed:
        return Unpacked(unpacked_names(names, kinds), weight)
    return Unpacked([name for name in names if not name.endswith("_scale")], weight)
