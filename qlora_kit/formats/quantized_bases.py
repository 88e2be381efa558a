"""Bases that are published quantized: their weights unpacked to 16 bit, so that an adapter can be trained on them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.cache import made_in_cache
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import quick_hash, read_json, staged_directory, write_json
from qlora_kit.export.stored_linears import folder_linears
from qlora_kit.formats.awq.load import unpacked_awq
from qlora_kit.formats.compressed.load import unpacked_compressed
from qlora_kit.formats.fp8_block import BLOCK
from qlora_kit.formats.fp8_block.load import unpacked_fp8_block
from qlora_kit.formats.gptq.load import unpacked_gptq
from qlora_kit.formats.registry import requested
from qlora_kit.formats.unpacked_folders import Unpacked
from qlora_kit.runs.named_base import located_base
from qlora_kit.schema.root import ExportRecipe
from qlora_kit.weights.headers import INDEX
from qlora_kit.weights.microscaled import read_weights
from qlora_kit.weights.reader import fp32_names
from qlora_kit.weights.torch_rows import read_whole

if TYPE_CHECKING:
    from torch import Tensor

MOST_IN_A_FILE = 4_000_000_000  # bytes


def unpacked_base(folder: Path) -> Unpacked | None:
    """The weights that a quantized folder stands for; None where it is packed in a way that is not read here."""
    settings = read_json(folder / "config.json").get("quantization_config")
    found = _READERS.get(str(settings.get("quant_method"))) if isinstance(settings, dict) else None
    if found is None or not isinstance(settings, dict):
        return None
    understood, unpacked = found
    return unpacked(folder) if understood(settings) else None


def write_unpacked(folder: Path, out: Path) -> None:
    """Write a quantized folder's weights in bfloat16, those in fp32 as they are, and a config.json of no quantization.

    Args:
        out: a folder that is not there yet; complete or absent.

    Raises:
        RecipeError: the folder is packed in a way that is not read here.
    """
    import shutil

    from safetensors.torch import save_file

    if (unpacked := unpacked_base(folder)) is None:
        told = read_json(folder / "config.json").get("quantization_config")
        raise RecipeError(f"{folder} is packed in a way that cannot be unpacked here: {told}", "model.source")
    with staged_directory(out) as staged:
        files = list(_files(unpacked))
        wide = fp32_names(folder)
        listed: dict[str, str] = {}
        total = 0
        for number, names in enumerate(files, 1):
            tensors = {name: _sixteen_bit(unpacked, name, is_wide=name in wide) for name in names}
            file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            save_file(tensors, staged / file, metadata={"format": "pt"})
            listed |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(files) > 1:
            write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))})
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
                shutil.copyfile(path, staged / path.name)
        config = dict(read_json(folder / "config.json"))
        del config["quantization_config"]
        write_json(staged / "config.json", {**config, "dtype": "bfloat16"})
        _refuse_unjoined(folder, staged)
    log.info(f"unpacked {folder} to 16 bit, {total / 1e9:.1f} GB, in {out}")


def with_unpacked_base(recipe: ExportRecipe) -> ExportRecipe:
    """A recipe that writes a quantized base as a 16-bit folder alone, of its unpacked weights; any other as it is.

    They lie in the cache, by the content of the base's files.

    Raises:
        RecipeError: the base is not there, or its weights cannot be unpacked.
    """
    wanted = {one.format.group for one in requested(recipe.export)}
    if recipe.base is None or wanted != {"merged"}:
        return recipe
    folder = located_base(recipe).folder
    if unpacked_base(folder) is None:
        return recipe
    content = "".join(quick_hash(path) for path in sorted(folder.glob("*.safetensors")))
    name = f"{folder.resolve().name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    place = made_in_cache("unpacked") / name
    if not place.exists():
        write_unpacked(folder, place)
    return replace(recipe, base=str(place), revision=None)


def _refuse_unjoined(folder: Path, unpacked: Path) -> None:
    """Refuse experts that lie apart in the packed folder, and that transformers does not join by itself."""
    if strange := [name for name in folder_linears(unpacked).otherwise if "expert" in name]:
        what = f"{folder} holds experts one by one ('{strange[0]}'), and transformers does not join them in this family"
        raise RecipeError(what, "model.source", "model.source=<the 16-bit model it was made from>")


def _sixteen_bit(unpacked: Unpacked, name: str, *, is_wide: bool) -> "Tensor":
    """A weight in bfloat16; what lies in fp32 beside packed weights, such as the biases of routers, stays so."""
    import torch

    tensor = unpacked.read(name)
    assert tensor is not None  # it is one of its names
    return (tensor.to(torch.bfloat16) if tensor.is_floating_point() and not is_wide else tensor).contiguous()


def _files(unpacked: Unpacked) -> Iterator[list[str]]:
    """Names for each file; a tensor is read to know its size, and again to be written."""
    names: list[str] = []
    size = 0
    for name in unpacked.names:
        tensor = unpacked.read(name)
        count = 0 if tensor is None else 2 * tensor.numel()
        if names and size + count > MOST_IN_A_FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += count
    yield names


def _unpacked_floats(folder: Path) -> Unpacked:
    """4-bit floats with an exponent for each 32, in stacks of experts."""
    tensors = read_weights(folder)
    return Unpacked(list(tensors), lambda name: read_whole(tensors[name]) if name in tensors else None)


def _plain_groups(settings: Mapping[str, Any]) -> bool:
    """Whether every group of layers has symmetric integers or floats with scales of groups, rows or tensors."""
    groups = list((settings.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    forms = {str(settings.get("format")), *(str(group.get("format")) for group in groups)}
    plain = all(
        one.get("symmetric") is True
        and one.get("strategy") in ("group", "channel", "tensor")
        and not one.get("actorder")
        for one in weights
    )
    return bool(weights) and plain and forms <= {"pack-quantized", "float-quantized", "None"}


_READERS: Mapping[str, tuple[Callable[[Mapping[str, Any]], bool], Callable[[Path], Unpacked]]] = {
    "gptq": (lambda settings: settings.get("checkpoint_format", "gptq") == "gptq", unpacked_gptq),
    "awq": (lambda settings: settings.get("version") in ("gemm", "gemv"), unpacked_awq),
    "compressed-tensors": (_plain_groups, unpacked_compressed),
    "fp8": (lambda settings: settings.get("weight_block_size") == [BLOCK, BLOCK], unpacked_fp8_block),
    "mxfp4": (lambda _: True, _unpacked_floats),
}
