"""How byte-level tokenizers split text before their merges, with the name that llama.cpp has for each way.

Recognized by what it says: digits apart or not, the pattern, and whether a whole word found in the vocabulary skips the
merges (`src/llama-vocab.cpp`).
"""

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

BYTES_WITH_OWN_PATTERN = ("bytes", "gpt2")
BYTES = ("bytes", "")
SINGLE_DIGITS = ("digits", "single")

Steps = tuple[tuple[str, str], ...]

# (steps, whole words skip the merges) -> tokenizer.ggml.pre
SPLITS: dict[tuple[Steps, bool], str] = {
    ((SINGLE_DIGITS, BYTES_WITH_OWN_PATTERN), False): "smollm",
    ((BYTES_WITH_OWN_PATTERN,), False): "gpt-2",
    ((("split", _LLAMA3), BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), BYTES), False): "dbrx",
    ((("split", _QWEN2), BYTES), False): "qwen2",
    ((("split", _QWEN35), BYTES), False): "qwen35",
    ((("split", _TEKKEN), BYTES), True): "tekken",
    ((("split", _GPT4O), BYTES), False): "gpt-4o",
}

# llama.cpp names its two kinds of vocabulary after the first that had them: byte-level merges, and sentencepiece.
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
