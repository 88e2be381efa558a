"""An adapter's folder as peft saved it, made fit to be handed on."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.files import read_json, write_json
from qlora_kit.weights.headers import StoredTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
CARD = "README.md"
PARAMETER = ".weight"  # behind the name of a linear module that is named among `target_parameters`


@dataclass(frozen=True)
class BaseName:
    """What is loaded under an adapter: a hub's repository or a folder, and the revision of the former."""

    source: str
    revision: str | None = None


def name_base(folder: Path, base: BaseName) -> None:
    """Name the base in a saved adapter as the recipe does, and remove peft's card.

    peft writes where the base was read from, which may be a cache below somebody's home, and a card of blanks.
    """
    (folder / CARD).unlink(missing_ok=True)
    named = {"base_model_name_or_path": base.source, "revision": base.revision}
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **named})


def split_parameters(
    named: Collection[str] | None, rank: object, tensors: Iterable[StoredTensor]
) -> tuple[set[str], list[str]]:
    """Of a saved adapter's `target_parameters` the linear modules, by the last parts of their names, and the rest.

    A stack of experts may be called `weight` too, but its first factor has as many rows as the rank for each expert.

    Args:
        rank: the adapter's own.
        tensors: of the adapter.
    """
    of_rank = {tensor.name.partition(".lora_A")[0] for tensor in tensors if tensor.rows == rank}
    whole = {name: name.removesuffix(PARAMETER) for name in named or () if name.endswith(PARAMETER)}
    linear = {name: module for name, module in whole.items() if any(one.endswith(f".{module}") for one in of_rank)}
    return {module.rpartition(".")[2] for module in linear.values()}, sorted(set(named or ()) - linear.keys())
