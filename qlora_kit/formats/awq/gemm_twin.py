"""An AWQ folder in GEMV's layout as the same numbers in GEMM's, which can be read without a GPU too."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json, write_json
from qlora_kit.schema.export import AwqLayout


def is_gemv(folder: Path) -> bool:
    """Whether a folder holds AWQ weights in the layout that has kernels for GPUs alone."""
    settings = read_json(folder / "config.json").get("quantization_config") or {}
    return settings.get("quant_method") == "awq" and settings.get("version") == AwqLayout.gemv.value


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
