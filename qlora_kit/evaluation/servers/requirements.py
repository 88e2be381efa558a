"""What servers require of an artifact's own files, for machines where the server itself is not there.

Keys and allowed values are from the servers' documentation and their configuration classes:
https://docs.vllm.ai/en/latest/features/quantization/ and https://docs.sglang.io/advanced_features/quantization.html.
They tell a file that a server refuses; they do not tell that it answers well. What a format has of its own is in its
folder below `formats/`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json

VLLM, SGLANG, OLLAMA = "vLLM", "SGLang", "Ollama"
_DESCRIBED = ("architectures", "model_type", "vocab_size")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Required:
    """A key of a JSON object, other names that it goes by, and the values it may have; none means any."""

    names: tuple[str, ...]
    allowed: tuple[object, ...] = ()

    def problem(self, settings: Mapping[str, Any], where: str) -> str | None:
        """What is wrong with it, if anything."""
        found = next((name for name in self.names if name in settings), None)
        if found is None:
            return f"{where} has no {' or '.join(self.names)}"
        if self.allowed and settings[found] not in self.allowed:
            shown = ", ".join(map(str, self.allowed))
            return f"{where}: {found} is {settings[found]}, which may be {shown}"
        return None


def required_problems(required: Iterable[Required], settings: Mapping[str, Any], where: str) -> Iterator[str]:
    """What is wrong with the keys of a JSON object."""
    yield from (problem for one in required if (problem := one.problem(settings, where)) is not None)


def sixteen_bit_problems(folder: Path) -> Iterator[str]:
    """What a server would refuse in a folder of 16-bit weights."""

    def of_settings(settings: object) -> Iterator[str]:
        if settings is not None:
            yield "config.json holds a quantization_config, but the weights are 16-bit"

    yield from _folder_problems(folder, of_settings)


def quantized_problems(
    folder: Path,
    required: Iterable[Required],
    also: Callable[[Mapping[str, Any]], Iterator[str]] = lambda _: iter(()),
) -> Iterator[str]:
    """What a server would refuse in a folder of quantized weights.

    Args:
        required: of its quantization_config.
        also: what else is wrong with that.
    """

    def of_settings(settings: object) -> Iterator[str]:
        if not isinstance(settings, dict):
            yield "config.json has no quantization_config, so servers would read the weights as 16-bit ones"
            return
        yield from required_problems(required, settings, "config.json, quantization_config")
        yield from also(settings)

    yield from _folder_problems(folder, of_settings)


def _folder_problems(folder: Path, of_settings: Callable[[object], Iterator[str]]) -> Iterator[str]:
    path = folder / "config.json"
    if not path.is_file():
        yield "there is no config.json"
        return
    config = read_json(path)
    described = config.get("text_config", config) | config
    yield from required_problems((Required((key,)) for key in _DESCRIBED), described, path.name)
    yield from _files(folder)
    yield from of_settings(config.get("quantization_config"))


def _files(folder: Path) -> Iterator[str]:
    if not any(folder.glob("*.safetensors")):
        yield "there is no *.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            yield f"weight files named by {index.name} are missing: {', '.join(missing)}"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"there is no tokenizer ({', '.join(_TOKENIZERS)})"
