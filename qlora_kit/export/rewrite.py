"""A checkpoint that equals another but for some tensors: what every format of safetensors folders hands over."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Replacement = Tensors | Callable[["Tensor"], Tensors]

INDEX = "model.safetensors.index.json"


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in name order.

    Raises:
        RunError: there are none.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise RunError(f"{model_dir} holds no .safetensors file", fix="merge the adapter into 16-bit weights first")
    return files


def rewrite_checkpoint(
    model_dir: Path,
    out_dir: Path,
    replacements: Mapping[str, Replacement],
    quantization: Mapping[str, object],
) -> None:
    """Copy a model folder, each named tensor replaced by others and a quantization_config added to config.json.

    Args:
        replacements: source tensor name to the tensors (name to CPU tensor) that stand in its place, or to what
            makes them of it; they go to the file that the source tensor lies in, so shards stay shards.

    Every other tensor and file keeps its bytes. One shard is held in memory at a time.

    Raises:
        RunError: a named tensor is not in the source.
    """
    from safetensors.torch import load_file, save_file

    missing, total = set(replacements), 0
    weight_map: dict[str, str] = {}
    for path in weight_files(model_dir):
        written: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            new: Replacement = replacements.get(name, {name: tensor})
            written |= new(tensor) if callable(new) else new
            missing.discard(name)
        save_file(written, out_dir / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(written, path.name)
        total += sum(tensor.nbytes for tensor in written.values())
    if missing:
        raise RunError(f"the checkpoint in {model_dir} has no tensor {', '.join(sorted(missing)[:3])}")
    _copy_other_files(model_dir, out_dir)
    if (model_dir / INDEX).exists():
        write_json(out_dir / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(out_dir / "config.json", {**read_json(model_dir / "config.json"), "quantization_config": quantization})


def _copy_other_files(model_dir: Path, out_dir: Path) -> None:
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, out_dir / path.name)
