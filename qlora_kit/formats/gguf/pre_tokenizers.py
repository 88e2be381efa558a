"""The names llama.cpp has for the text-splitting step of byte-level BPE tokenizers.

llama.cpp compiles the split patterns in and picks one by `tokenizer.ggml.pre` (`src/llama-vocab.cpp`), so the step of a
tokenizer.json has to be recognized. It is recognized by what it says: digits apart or not, the pattern, and whether a
whole word found in the vocabulary skips the merges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.families.splits import BYTES, BYTES_WITH_OWN_PATTERN, SINGLE_DIGITS, SPLITS


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the content of a tokenizer.json is of the kind that splits text before its merges."""
    return '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def known_split(tokenizer: Mapping[str, Any]) -> str | None:
    """The `tokenizer.ggml.pre` that is known here for the content of a tokenizer.json."""
    return SPLITS.get((_steps(tokenizer), bool(tokenizer["model"].get("ignore_merges"))))


def name_of_pre_tokenizer(tokenizer: Mapping[str, Any], where: str, otherwise: str = "") -> str:
    """The `tokenizer.ggml.pre` of a byte-level BPE tokenizer.

    Args:
        tokenizer: the content of tokenizer.json.
        where: what to call the tokenizer in an error.
        otherwise: the name where none is known here.

    Raises:
        RecipeError: llama.cpp has no such split, or it is not in `SPLITS`.
    """
    name = known_split(tokenizer) or otherwise
    if not name:
        raise RecipeError(
            f"no llama.cpp name is known for how the tokenizer of {where} splits text: {_steps(tokenizer)}",
            where="tokenizer.json, pre_tokenizer",
            fix=f"known: {', '.join(SPLITS.values())}; choose another export target",
        )
    return name


def _steps(tokenizer: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(_described(step) for step in _flat(tokenizer.get("pre_tokenizer")))


def _flat(step: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _flat(part)]
    return [step]


def _described(step: Mapping[str, Any]) -> tuple[str, str]:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return BYTES_WITH_OWN_PATTERN if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return SINGLE_DIGITS
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return ("split", str(step["pattern"].get("Regex")))
    return (kind, "unknown settings")
