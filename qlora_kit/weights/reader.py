"""Weights by name, one at a time."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WeightReader = Callable[[str], "Tensor | None"]


def stored_tensors(folder: Path) -> WeightReader:
    """Tensors of a folder's safetensors files as they are stored, by name; None for a name that is not there."""
    from safetensors import safe_open

    file_of: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> "Tensor | None":
        if name not in file_of:
            return None
        with safe_open(file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read


def tensor_names(folder: Path) -> list[str]:
    """Names of the tensors of a folder's safetensors files, of whatever types."""
    from safetensors import safe_open

    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def fp32_names(folder: Path) -> set[str]:
    """Names of the tensors of a folder's safetensors files that are stored in fp32."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name for name in file.keys() if file.get_slice(name).get_dtype() == "F32"}  # noqa: SIM118  # no mapping
    return found


def tensors_by_kind(read: WeightReader, name: str, kinds: tuple[str, ...]) -> "dict[str, Tensor] | None":
    """The tensors of several kinds that stand in a weight's place, by kind; None where one is missing."""
    module = name.removesuffix(".weight")
    found = {kind: tensor for kind in kinds if (tensor := read(f"{module}.{kind}")) is not None}
    return found if len(found) == len(kinds) else None


def unpacked_names(names: Iterable[str], kinds: tuple[str, ...]) -> list[str]:
    """A folder's names with one weight in the place of the tensors of several kinds that stand for it."""
    names, mark = list(names), f".{kinds[0]}"
    packed = [name.removesuffix(mark) for name in names if name.endswith(mark)]
    parts = {f"{module}.{kind}" for module in packed for kind in kinds}
    return [*(name for name in names if name not in parts), *(f"{module}.weight" for module in packed)]
