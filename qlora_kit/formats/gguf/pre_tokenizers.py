"""The names llama.cpp has for the text-splitting step of byte-level BPE tokenizers.

llama.cpp compiles the split patterns in and picks one by `tokenizer.ggml.pre` (`src/llama-vocab.cpp`), so the step of a
tokenizer.json has to be recognised. It is recognised by what it says: digits apart or not, the pattern, and whether a
whole word found in the vocabulary skips the merges.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.core.errors import RecipeError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER_THEN_LOWER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
    r"|{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _UPPER_THEN_LOWER.replace("{suffix}", "").replace("{digits}", r"\p{N}")
_GPT4O = _UPPER_THEN_LOWER.replace("{suffix}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("{digits}", r"\p{N}{1,3}")

_BYTES_WITH_GPT2_PATTERN = ("bytes", "gpt2")
_BYTES = ("bytes", "")
_SINGLE_DIGITS = ("digits", "single")

Steps = tuple[tuple[str, str], ...]

# (steps, whole words skip the merges) -> tokenizer.ggml.pre
KNOWN: dict[tuple[Steps, bool], str] = {
    ((_SINGLE_DIGITS, _BYTES_WITH_GPT2_PATTERN), False): "smollm",
    ((_BYTES_WITH_GPT2_PATTERN,), False): "gpt-2",
    ((("split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), _BYTES), False): "dbrx",
    ((("split", _QWEN2), _BYTES), False): "qwen2",
    ((("split", _QWEN35), _BYTES), False): "qwen35",
    ((("split", _TEKKEN), _BYTES), True): "tekken",
    ((("split", _GPT4O), _BYTES), False): "gpt-4o",
}


def name_of_pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """The `tokenizer.ggml.pre` of a byte-level BPE tokenizer.

    Args:
        tokenizer: the content of tokenizer.json.
        where: what to call the tokenizer in an error.

    Raises:
        RecipeError: llama.cpp has no such split, or it is not in the table above.
    """
    steps = tuple(_described(step) for step in _flat(tokenizer.get("pre_tokenizer")))
    name = KNOWN.get((steps, bool(tokenizer["model"].get("ignore_merges"))))
    if name is None:
        raise RecipeError(
            f"no llama.cpp name is known for how the tokenizer of {where} splits text: {steps}",
            where="tokenizer.json, pre_tokenizer",
            fix=f"known: {', '.join(KNOWN.values())}; choose another export target",
        )
    return name


def _flat(step: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _flat(part)]
    return [step]


def _described(step: Mapping[str, Any]) -> tuple[str, str]:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return _BYTES_WITH_GPT2_PATTERN if step.get("use_regex", True) else _BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return _SINGLE_DIGITS
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return ("split", str(step["pattern"].get("Regex")))
    return (kind, "unknown settings")
