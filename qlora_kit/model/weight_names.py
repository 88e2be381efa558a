"""What a safetensors folder holds, read from the headers alone."""

import json
import struct
from pathlib import Path

NOT_LINEAR = ("norm", "layernorm", "embed", "lm_head")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files (header: u64 length, then JSON)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def linear_module_names(folder: Path) -> set[str]:
    """Last parts of the names of the linear modules, the embedding and the output head aside."""
    modules = [
        name.removesuffix(".weight")
        for name, shape in tensor_shapes(folder).items()
        if len(shape) == 2 and name.endswith(".weight")
    ]
    last = {module.rsplit(".", 1)[-1] for module in modules}
    return {name for name in last if not any(part in name for part in NOT_LINEAR)}
