"""What a library's saved folder changed against the folder it was made from, tensor by tensor."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.export.rewrite import weight_files

if TYPE_CHECKING:
    from torch import Tensor

Replacements = dict[str, dict[str, "Tensor"]]


def changed_tensors(source: Path, made: Path, marks: Iterable[str]) -> Replacements:
    """Source tensor name to the tensors of `made` that stand in its place, as `rewrite_checkpoint` takes them.

    A quantized layer's weight is replaced by everything that `made` holds under the layer and `source` does not. A
    tensor that only differs in dtype, because a library computed in another one, keeps the source's bytes; one that
    differs in value takes the new value in the source's dtype. What belongs to no layer, such as scales of a
    key-value cache, goes with the first source tensor of the same block.

    Args:
        marks: endings of the tensors that only a quantized layer has, after the layer's name and a dot.

    Raises:
        RunError: no layer of `made` is quantized.
    """
    old, new = dict(_tensors(source)), dict(_tensors(made))
    quantized = {name.removesuffix(f".{mark}") for mark in marks for name in new if name.endswith(f".{mark}")}
    if not quantized:
        raise RunError(f"no layer of {source.name} was quantized")
    found: Replacements = {f"{module}.weight": {} for module in quantized}
    for name, tensor in new.items():
        layer = _layer_of(name, quantized)
        if layer and (name not in old or name == f"{layer}.weight"):
            found[f"{layer}.weight"][name] = tensor
        elif name not in old:
            anchor = _first_beside(name, old)
            found.setdefault(anchor, {anchor: old[anchor]})[name] = tensor
        elif not _same(tensor, old[name]):
            found[name] = {name: tensor.to(old[name].dtype)}
    return found


def _same(made: "Tensor", source: "Tensor") -> bool:
    """Whether one is the other in its dtype: a library may have computed in a wider one, or in a narrower one."""
    return made.to(source.dtype).equal(source) or source.to(made.dtype).equal(made)


def _tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    from safetensors.torch import load_file

    for path in weight_files(folder):
        yield from load_file(path).items()


def _layer_of(name: str, quantized: set[str]) -> str:
    """The quantized layer that a tensor lies under, however deep, or an empty string."""
    parts = name.split(".")
    return next((prefix for end in range(len(parts), 0, -1) if (prefix := ".".join(parts[:end])) in quantized), "")


def _first_beside(name: str, old: Mapping[str, "Tensor"]) -> str:
    block = name.rpartition(".")[0] + "."
    beside = sorted(other for other in old if other.startswith(block))
    if not beside:
        raise RunError(f"the quantized model holds {name}, which has no place in the source")
    return beside[0]
