"""AWQ folders, loaded by transformers with gptqmodel, or with their weights unpacked where these read them wrongly.

One in GEMV's layout is read as the same numbers in GEMM's where there is no GPU.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.files import read_json, write_json
from qlora_kit.formats.gptqmodel_folders import is_read_by_library, load_quantized
from qlora_kit.formats.unpacked_folders import Unpacked, load_weights
from qlora_kit.schema.export import AwqLayout
from qlora_kit.weights.reader import stored_tensors, tensor_names, tensors_by_kind, unpacked_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def is_gemv(folder: Path) -> bool:
    """Whether a folder holds AWQ weights in the layout that has kernels for GPUs alone."""
    config = folder / "config.json"
    settings = (read_json(config).get("quantization_config") or {}) if config.is_file() else {}
    return settings.get("quant_method") == "awq" and settings.get("version") == AwqLayout.gemv.value


def load_awq(folder: Path) -> "PreTrainedModel":
    """Load an AWQ folder, ready to score: as `load_quantized` does, or with its weights unpacked.

    One in GEMV's layout is loaded from its twin where there is no GPU.

    Raises:
        RecipeError, RunError: as `load_quantized`.
    """
    import torch

    if not is_read_by_library(folder):
        return load_weights(folder, unpacked_awq(folder))
    if torch.cuda.is_available() or not is_gemv(folder):
        return load_quantized(folder)
    with gemm_twin(folder) as twin:
        return load_quantized(twin)


@contextmanager
def gemm_twin(folder: Path) -> Iterator[Path]:
    """The twin, beside the folder, for as long as it is loaded: the codes, scales and zero points are the same."""
    from safetensors.torch import load_file, save_file

    # Beside the exports, where there is room for a model; a temporary folder may lie in memory.
    parent = folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".twin.", suffix=".partial", dir=parent) as place:
        twin, config = Path(place), dict(read_json(folder / "config.json"))
        settings: dict[str, Any] = dict(config["quantization_config"])
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                tensors = _in_gemm(load_file(path), int(settings["group_size"]))
                save_file(tensors, twin / path.name, metadata={"format": "pt"})
            elif path.is_file() and path.name != "config.json":
                (twin / path.name).symlink_to(path.resolve())
        write_json(twin / "config.json", config | {"quantization_config": settings | {"version": AwqLayout.gemm.value}})
        yield twin


def _in_gemm(tensors: dict[str, Any], group_size: int) -> dict[str, Any]:
    from qlora_kit.formats.awq.layout import KINDS, gemm_tensors, unpacked

    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        packed = {kind: tensors[f"{module}.{kind}"] for kind in KINDS}
        made = gemm_tensors(*unpacked(packed, group_size, AwqLayout.gemv))
        found |= {f"{module}.{kind}": tensor for kind, tensor in made.items()}
    return found


def unpacked_awq(folder: Path) -> Unpacked:
    """The weights that an AWQ folder stands for."""
    from qlora_kit.formats.awq.layout import KINDS, unpacked_weight

    settings = read_json(folder / "config.json")["quantization_config"]
    group_size, layout = int(settings["group_size"]), AwqLayout(settings["version"])
    read = stored_tensors(folder)

    def weight(name: str) -> "Tensor | None":
        packed = tensors_by_kind(read, name, KINDS)
        return read(name) if packed is None else unpacked_weight(packed, group_size, layout)

    return Unpacked(unpacked_names(tensor_names(folder), KINDS), weight)
