"""Tokenizer -> GGUF vocabulary: tokens, types, merges or scores, special ids, stop tokens, chat template.

Two kinds exist in llama.cpp for these models (`src/llama-vocab.cpp`): byte-level BPE with merges, and
sentencepiece-like BPE with scores. Both are read from what transformers loads for the folder, so that the file and
training agree whichever files the folder holds.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from qlora_kit.core.collection import no_collection
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.template.closing import LLAMA_CPP_STOPS
from qlora_kit.data.template.own_date import with_own_date
from qlora_kit.families.splits import BYTE_LEVEL, SENTENCEPIECE
from qlora_kit.formats.gguf.pre_tokenizers import is_byte_level, name_of_pre_tokenizer

_SPACE = "▁"  # stands for a space in sentencepiece-like vocabularies
_BYTE_LEVEL_SPACE = "Ġ"  # the same in byte-level ones
_NEVER_MERGED_SCORE = -1e6  # below every merge rank


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as in llama.cpp's `enum llama_token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Everything under tokenizer.*; `scores` belong to SENTENCEPIECE, `merges` and `pre` to BYTE_LEVEL."""

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | Mapping[str, str] | None
    strips_after_special: bool


def read_vocabulary(
    model_dir: Path, rows: int, stop_ids: Sequence[int], config: Mapping[str, Any], split: str = ""
) -> Vocabulary:
    """The vocabulary of a folder's tokenizer, padded or cut to the embedding's rows.

    Args:
        model_dir: Hugging Face folder.
        rows: rows of the token embedding; llama.cpp wants as many tokens.
        stop_ids: token ids that end a generation.
        config: fields of config.json, for special ids the tokenizer does not state.
        split: llama.cpp's name of how the tokenizer splits text, where none is known here.

    Raises:
        RecipeError: a tokenizer of another kind, or with a step llama.cpp does not have.
    """
    # Else, for each of the lists that a vocabulary is, all of them are looked through again.
    with no_collection():
        return _read_vocabulary(model_dir, rows, stop_ids, config, split)


def _read_vocabulary(
    model_dir: Path, rows: int, stop_ids: Sequence[int], config: Mapping[str, Any], split: str
) -> Vocabulary:
    tokenizer, content = _load_tokenizer(model_dir)
    where = model_dir.name
    special = {key: getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "unk", "pad")}
    stated = {key: config.get(f"{key}_token_id") if i is None else i for key, i in special.items()}
    usable: dict[str, int] = {key: i for key, i in stated.items() if isinstance(i, int) and 0 <= i < rows}
    _tell_beyond(content, rows, {*special.values(), *stop_ids}, str(tokenizer.chat_template or ""), where)
    add_bos, add_eos = _added_around_text(tokenizer.backend_tokenizer, usable, where)
    is_bytes = is_byte_level(content)
    _refuse_other_preparation(content, where, is_bytes)
    tokens, types = _tokens_and_types(content, rows, None if is_bytes else usable.get("unk"))
    _add_stop_ids(usable, stop_ids, tokens, keep_eos=add_eos)
    return Vocabulary(
        kind=BYTE_LEVEL if is_bytes else SENTENCEPIECE,
        pre=name_of_pre_tokenizer(content, where, split) if is_bytes else "default",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=() if is_bytes else _scores(content, tokens),
        merges=_merges(content) if is_bytes else (),
        special_ids=usable,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=not is_bytes and _adds_space_prefix(content),
        chat_template=_served_template(tokenizer.chat_template),
        strips_after_special=any(entry["special"] and entry["rstrip"] for entry in content["added_tokens"]),
    )


def _tell_beyond(
    content: Mapping[str, Any], rows: int, needed: Collection[int | None], template: str, where: str
) -> None:
    """Say which tokens the embedding has no row for, which the file cannot hold either.

    Raises:
        RecipeError: one of them ends an answer, or stands in the chat template.
    """
    vocabulary = content["model"]["vocab"]
    pairs = list(vocabulary.items() if isinstance(vocabulary, dict) else ())
    pairs += [(entry["content"], entry["id"]) for entry in content["added_tokens"]]
    beyond = {token: text for text, token in pairs if token >= rows}
    used = [text for token, text in beyond.items() if token in needed or text in template]
    if used:
        raise RecipeError(
            f"the tokenizer of {where} has {used[0]}, which ends answers or stands in the chat template, beyond the "
            f"{rows:,} rows of the embedding, so a GGUF file cannot hold it",
            fix="use the tokenizer that belongs to the base",
        )
    if beyond:
        named = ", ".join(list(beyond.values())[:3])
        log.info(
            f"{counted(len(beyond), 'token of the tokenizer is', 'tokens of the tokenizer are')} beyond the "
            f"{rows:,} rows of the embedding; left out: {named}"
        )


def _served_template(template: str | Mapping[str, str] | None) -> str | Mapping[str, str] | None:
    """The chat template, with the date that training saw: llama.cpp gives today's to every template that asks."""
    return with_own_date(template) if isinstance(template, str) else template


def _load_tokenizer(model_dir: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = content["model"]["type"] if content else type(tokenizer).__name__
    if kind != "BPE":
        raise RecipeError(
            f"no GGUF export for the tokenizer of {model_dir.name}: {kind}",
            where="tokenizer.json, model",
            fix="choose another export target; GGUF takes byte-level and sentencepiece BPE",
        )
    return tokenizer, content


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write tokenizer.* through an open `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.kind == SENTENCEPIECE:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    else:
        writer.add_token_merges(list(vocabulary.merges))
    for role, token_id in vocabulary.special_ids.items():
        writer.add_uint32(_ID_KEYS[role], token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    template = vocabulary.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def _tokens_and_types(content: Mapping[str, Any], rows: int, unknown: int | None) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    has_bytes = not is_byte_level(content) and bool(content["model"].get("byte_fallback"))
    for token, token_id in content["model"]["vocab"].items():
        if token_id < rows:
            tokens[token_id] = token
            types[token_id] = TokenType.BYTE if has_bytes and _is_byte_token(token) else TokenType.NORMAL
    for entry in content["added_tokens"]:
        token_id, token = entry["id"], entry["content"]
        if token_id >= rows:
            continue
        if entry["special"] or _looks_special(token):
            tokens[token_id], types[token_id] = token, TokenType.CONTROL
        else:
            # matched against the raw text, which has spaces
            tokens[token_id], types[token_id] = token.replace(_SPACE, " "), TokenType.USER_DEFINED
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _looks_special(token: str) -> bool:
    """Tokens that some models forget to mark as special, and llama.cpp's conversion marks (conversion/base.py)."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))  # noqa: RUF001  DeepSeek's wide bars
    wrapped = any(token.startswith(left) and token.endswith(right) for left, right in brackets)
    return wrapped or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _pairs(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    stored: list[str | list[str]] = content["model"]["merges"]
    split = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in stored]
    return [(left, right) for left, right in split]


def _merges(content: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = _pairs(content)
    return tuple(" ".join(part.replace(" ", _BYTE_LEVEL_SPACE) for part in pair) for pair in pairs)


def _scores(content: Mapping[str, Any], tokens: Sequence[str]) -> tuple[float, ...]:
    """Minus the rank of the first merge that makes a token: sentencepiece's score, up to a constant.

    tokenizer.json has merges where sentencepiece has scores; transformers sorted the merges by those scores.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(content)):
        ranks.setdefault(left + right, rank)
    return tuple(float(-ranks[token]) if token in ranks else _NEVER_MERGED_SCORE for token in tokens)


def _added_around_text(backend: Any, special_ids: Mapping[str, int], where: str) -> tuple[bool, bool]:
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    if before not in ([], [special_ids.get("bos")]) or after not in ([], [special_ids.get("eos")]):
        raise RecipeError(
            f"the tokenizer of {where} puts tokens {before} before and {after} after a text; "
            "llama.cpp can add one BOS and one EOS",
            where="tokenizer.json, post_processor",
        )
    return bool(before), bool(after)


def _normalizer_steps(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    normalizer = content.get("normalizer")
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


# text preparation that llama.cpp does too; NFC it does not, which only shows on decomposed letters
_KNOWN_NORMALIZERS = {True: {"NFC"}, False: {"Prepend", "Replace"}}
_KNOWN_SPLITS = {"none", "Metaspace", "Split"}


def _refuse_other_preparation(content: Mapping[str, Any], where: str, is_bytes: bool) -> None:
    steps = [step["type"] for step in _normalizer_steps(content)]
    split = (content.get("pre_tokenizer") or {"type": "none"})["type"]
    if set(steps) <= _KNOWN_NORMALIZERS[is_bytes] and (is_bytes or split in _KNOWN_SPLITS):
        return
    raise RecipeError(
        f"the tokenizer of {where} prepares text in a way llama.cpp does not: {', '.join([*steps, split])}",
        where="tokenizer.json, normalizer and pre_tokenizer",
        fix="choose another export target",
    )


def _adds_space_prefix(content: Mapping[str, Any]) -> bool:
    prepends = any(step["type"] == "Prepend" for step in _normalizer_steps(content))
    pre_tokenizer = content.get("pre_tokenizer") or {}
    return prepends or pre_tokenizer.get("prepend_scheme") in ("always", "first")


def _add_stop_ids(
    special_ids: dict[str, int], stop_ids: Sequence[int], tokens: Sequence[str], *, keep_eos: bool
) -> None:
    """Give every stop token a key of its own, or leave it to llama.cpp where it knows the text.

    Raises:
        RecipeError: more stop tokens than keys.
    """
    if stop_ids and special_ids.get("eos") not in stop_ids and not keep_eos:
        special_ids["eos"] = stop_ids[0]
    rest = [i for i in stop_ids if i != special_ids.get("eos") and i < len(tokens)]
    rest.sort(key=lambda i: tokens[i] in LLAMA_CPP_STOPS)
    special_ids.update(zip(("eot", "eom"), rest, strict=False))
    unnamed = [tokens[i] for i in rest[2:] if tokens[i] not in LLAMA_CPP_STOPS]
    if unnamed:
        raise RecipeError(
            f"a GGUF file names at most three stop tokens; no room for {unnamed}",
            where="generation_config.json, eos_token_id",
            fix="list fewer stop tokens",
        )
