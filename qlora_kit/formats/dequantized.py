"""The weights that a finished artifact stands for, one tensor at a time, under the names of the merged model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import require
from qlora_kit.core.files import read_json
from qlora_kit.export.stored_weights import WeightReader, stored_tensors
from qlora_kit.formats.gptq.layout import PACKED
from qlora_kit.schema.export import AwqLayout

if TYPE_CHECKING:
    from torch import Tensor

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf")
FITTING_ROUNDS = 3


def dequantized_weights(artifact: Path, merged_dir: Path) -> WeightReader:
    """A reader of the weights that an artifact stands for, float32 [out_features, in_features], by the merged name.

    Args:
        artifact: a GGUF file (of several, the first), or a folder of GPTQ, AWQ, bitsandbytes or 16 bits.
        merged_dir: the 16-bit folder it was made from.

    AWQ moves factors between neighbouring weights; they are fitted to the merged weight and taken out again. A GGUF
    file's query and key rows are put back into the merged model's order.

    Raises:
        RunError: a layout whose weights this cannot unpack.
    """
    if artifact.is_file():
        return _gguf_weights(artifact, read_json(merged_dir / "config.json"))
    settings = read_json(artifact / "config.json").get("quantization_config") or {}
    method, read = settings.get("quant_method"), stored_tensors(artifact)
    if method is None:
        return read
    if method == "gptq":
        return _gptq_weights(read)
    if method == "awq":
        return _awq_weights(read, stored_tensors(merged_dir), settings)
    if method == "bitsandbytes":
        return _bnb_weights(artifact, read)
    raise RunError(f"{artifact} is in the layout '{method}', whose weights cannot be compared one by one")


def _packed(read: WeightReader, name: str, kinds: tuple[str, ...]) -> "dict[str, Tensor] | None":
    module = name.removesuffix(".weight")
    found = {kind: tensor for kind in kinds if (tensor := read(f"{module}.{kind}")) is not None}
    return found if len(found) == len(kinds) else None


def _gptq_weights(read: WeightReader) -> WeightReader:
    from qlora_kit.formats.gptq.layout import unpacked_weight

    def weight(name: str) -> "Tensor | None":
        packed = _packed(read, name, PACKED)
        return read(name) if packed is None else unpacked_weight(packed)

    return weight


def _awq_weights(read: WeightReader, merged: WeightReader, settings: Mapping[str, Any]) -> WeightReader:
    from qlora_kit.formats.awq.layout import KINDS, unpacked_weight

    def weight(name: str) -> "Tensor | None":
        packed, source = _packed(read, name, KINDS), merged(name)
        if packed is None or source is None:
            return read(name)
        found = unpacked_weight(packed, int(settings["group_size"]), AwqLayout(settings["version"]))
        return without_factors(found, source.float())

    return weight


def _bnb_weights(artifact: Path, read: WeightReader) -> WeightReader:
    import torch

    from qlora_kit.export.merging.read_base import StoredTensor, read_headers
    from qlora_kit.export.merging.rounded import read_stored, weight_beside

    tensors = read_headers(artifact)
    states: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if (beside := weight_beside(name)) is not None:
            states.setdefault(beside, {})[name] = tensor

    def weight(name: str) -> "Tensor | None":
        if name not in states or name not in tensors:
            return read(name)
        return read_stored(tensors[name], states[name], torch.device("cpu"))

    return weight


def without_factors(scaled: "Tensor", like: "Tensor") -> "Tensor":
    """A weight with a factor on each row and each column, divided by the factors that fit `like` best.

    Both float32 [out_features, in_features]. Least squares for columns and rows in turn, each with the other taken out
    before, so that large factors do not weigh more; a factor is fitted to hundreds of weights, so it takes out the
    folded scale and next to nothing of the rounding error.
    """
    import torch

    square = like.square()
    columns, rows = torch.ones(1, like.shape[1]), torch.ones(len(like), 1)
    for _ in range(FITTING_ROUNDS):
        columns = _factors(scaled / rows, like, square, 0)
        rows = _factors(scaled / columns, like, square, 1)
    return scaled / rows / columns


def _factors(scaled: "Tensor", like: "Tensor", square: "Tensor", dim: int) -> "Tensor":
    import torch

    factors = (scaled * like).sum(dim, keepdim=True) / square.sum(dim, keepdim=True)
    # A row or column of zeros has no factor.
    return torch.where(factors.isfinite() & (factors != 0), factors, 1)


def _gguf_weights(file: Path, config: Mapping[str, Any]) -> WeightReader:
    gguf = require("gguf", "Reading GGUF files")
    import torch

    from qlora_kit.formats.gguf.architectures import find_architecture
    from qlora_kit.formats.gguf.tensors import paired_order, rotated_heads_of

    readers = [gguf.GGUFReader(part) for part in _shards(file)]
    architecture = readers[0].fields["general.architecture"].contents()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}

    def weight(name: str) -> "Tensor | None":
        tensor = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            return None
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = rotated_heads_of(name, find_architecture(config), config)
        return values[paired_order(len(values), heads).argsort()] if heads else values

    return weight


def _shards(file: Path) -> list[Path]:
    named = SHARD.search(file.name)
    if not named:
        return [file]
    return sorted(file.parent.glob(f"{file.name[: named.start()]}-*-of-{named.group(1)}.gguf"))
