"""The weights that a GGUF file stands for."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.extras import require
from qlora_kit.core.files import read_json
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.architectures import find_architecture, has_own_rules
from qlora_kit.formats.gguf.converter.weights import converted_weights
from qlora_kit.formats.gguf.tensors import paired_order, rotated_heads_of
from qlora_kit.weights.reader import WeightReader, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf")


def gguf_weights(file: Path, merged: Path) -> WeightReader:
    """A reader of them, float32 [out_features, in_features], by the merged name.

    Query and key rows are put back into the merged model's order; see `converted_weights` for families that the kit has
    no rules for.

    Args:
        file: of several, the first.
    """
    config = read_json(merged / "config.json")
    gguf = require("gguf", "Reading GGUF files", EXTRA)
    import torch

    readers = [gguf.GGUFReader(part) for part in _shards(file)]
    architecture = readers[0].fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    if not has_own_rules(config):
        return converted_weights(tensors, architecture, config, stored_tensors(merged))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])

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
