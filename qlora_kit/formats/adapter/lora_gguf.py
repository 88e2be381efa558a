"""A LoRA adapter as llama.cpp loads it beside its base: one GGUF file of two small tensors for each layer.

Keys, tensor names and shapes are those that llama.cpp's `llama-adapter.cpp` reads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.saved import CONFIG, PREFIX, WEIGHTS
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted
from qlora_kit.families.family import ConfigFields, GgufRules
from qlora_kit.formats.gguf.architectures import find_architecture
from qlora_kit.formats.gguf.metadata import read_full_config
from qlora_kit.formats.gguf.tensors import gguf_names, paired_order, rotated_heads_of
from qlora_kit.formats.gguf.whole_file import whole_gguf

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_ELSEWHERE = "export.adapter.<name>.format=peft, or a merged file"
# Starts that change the base's weights too, which a server never hears of.
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq")


@dataclass(frozen=True)
class LoraPair:
    """The update of one layer, of rank r: `down` [r, in_features] and `up` [out_features, r], float32.

    The layer's weight gains `up @ down`, times the file's alpha over r.
    """

    name: str
    down: "npt.NDArray[np.float32]"
    up: "npt.NDArray[np.float32]"


def write_lora_gguf(adapter_dir: Path, model_dir: Path, out_file: Path, base_name: str) -> int:
    """Write a peft adapter as one GGUF file of float32 tensors and return its number of layers.

    Args:
        adapter_dir: adapter_config.json and adapter_model.safetensors.
        model_dir: folder of the base or of the merged model, for config.json.
        out_file: written beside its place and renamed, so it is complete or absent.
        base_name: `general.base_model.0.name`.

    Raises:
        RecipeError: llama.cpp has no place for what the adapter holds.
    """
    settings = read_json(adapter_dir / CONFIG)
    refuse_changed_base(settings)
    refuse_unplaced(settings)
    config = read_full_config(model_dir)
    architecture = find_architecture(config)
    pairs = lora_pairs(adapter_dir, settings, architecture, config)
    with whole_gguf(out_file, architecture.name, "writing a GGUF file") as writer:
        _add_keys(writer, f"{base_name} adapter", base_name, float(settings["lora_alpha"]))
        for pair in pairs:
            writer.add_tensor(f"{pair.name}.lora_a", pair.down)
            writer.add_tensor(f"{pair.name}.lora_b", pair.up)
    return len(pairs)


def _add_keys(writer: Any, name: str, base_name: str, alpha: float) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)


def refuse_changed_base(settings: Mapping[str, Any]) -> None:
    """Refuse adapters that fit only a base whose weights their start has changed.

    Raises:
        RecipeError: with the name of that start.
    """
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise RecipeError(
            f"lora.init={start} changed the base's weights before training, and servers load the adapter beside the "
            "unchanged base",
            where="lora.init",
            fix="export a merged file instead",
        )


def refuse_unplaced(settings: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp has no place for, by an adapter's settings.

    Raises:
        RecipeError: all of it.
    """
    refused = {
        "use_dora": "DoRA's magnitudes",
        "modules_to_save": "modules trained in full",
        "lora_bias": "biases of an adapter",
        "trainable_token_indices": "trained rows of the embedding",
    }
    problems = []
    for key, held in refused.items():
        if value := settings.get(key):
            names = f" ({', '.join(map(str, value))})" if isinstance(value, list) else ""
            what = f"llama.cpp's adapter files have no place for {held}{names}"
            problems.append(Problem(what, where=f"lora.{key}", fix=_ELSEWHERE))
    if problems:
        raise RecipeError(problems)


def lora_pairs(
    adapter_dir: Path, settings: Mapping[str, Any], architecture: GgufRules, config: ConfigFields
) -> list[LoraPair]:
    """The adapter's tensors under llama.cpp's names, rows in its order, each layer's own scale in `up`.

    llama.cpp scales every layer by the file's alpha over the rank; what a layer's own alpha or a rank-stabilized
    scale differs from that goes into its `up`.

    Raises:
        RecipeError: a tensor that is neither half of an update of a linear layer that llama.cpp knows.
    """
    import numpy as np
    from safetensors.torch import load_file

    stored = {name: tensor.float().numpy() for name, tensor in load_file(adapter_dir / WEIGHTS).items()}
    modules = _adapted_modules(stored)
    if "lm_head" in modules and config.get("tie_word_embeddings"):
        what = "this model's output head shares the embedding's weights, and llama.cpp adapts only one of the two"
        raise RecipeError(what, where="lora.targets", fix=_ELSEWHERE)
    names = gguf_names([f"{module}.weight" for module in modules], architecture.name, config["num_hidden_layers"])
    pairs = []
    for module in modules:
        down, up = (stored[f"{PREFIX}{module}.lora_{half}.weight"] for half in "AB")
        heads = rotated_heads_of(f"{module}.weight", architecture, config)
        up = up[paired_order(len(up), heads)] if heads else up
        scaled = np.ascontiguousarray(up * _own_scale(module, len(down), settings), dtype=np.float32)
        pairs.append(LoraPair(names[f"{module}.weight"], down, scaled))
    return sorted(pairs, key=lambda pair: pair.name)


def _adapted_modules(stored: Mapping[str, "npt.NDArray[np.float32]"]) -> list[str]:
    ends = (".lora_A.weight", ".lora_B.weight")
    strange = [name for name in stored if not name.endswith(ends)]
    if strange:
        raise RecipeError(
            f"llama.cpp's adapter files have no place for {counted(len(strange), 'tensor')}, first {strange[0]}",
            fix=_ELSEWHERE,
        )
    return sorted(
        {name.removeprefix(PREFIX).removesuffix(end) for name in stored for end in ends if name.endswith(end)}
    )


def _own_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """What a layer's scale is by peft, over what llama.cpp takes it for."""
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    alpha = float(settings["lora_alpha"])
    own = float(patterns.get(get_pattern_key(patterns.keys(), module), alpha))
    return own / alpha * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
