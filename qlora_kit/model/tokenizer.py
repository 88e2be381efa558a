"""Loads the tokenizer of a base: a fast one, with a pad token, and the chat template that the recipe asks for."""

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import DamagedFileError, RecipeError
from qlora_kit.core.files import read_json, typed_path
from qlora_kit.families.registry import CHAT_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_TOKENS = 2**24  # in a vocabulary: sixty times the largest that is published
# Tokens that published vocabularies reserve and never produce, the likeliest first.
_RESERVED = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|reserved_special_token_0|>")


def stop_ids(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Ids that end an answer when the model is served: the tokenizer's end of text and the generation settings' own.

    Raises:
        DamagedFileError: generation_config.json is no JSON object, or names something that is no token.
    """
    ids = [*_listed_ends(folder / "generation_config.json"), tokenizer.eos_token_id]
    return frozenset(token for token in ids if token is not None)


def _listed_ends(path: Path) -> list[int | None]:
    if not path.is_file():
        return []
    try:
        listed = read_json(path).get("eos_token_id")
    except ValueError as error:
        raise DamagedFileError(f"{path} cannot be read: {error}", str(path), "fetch or copy this file again") from error
    ids = listed if isinstance(listed, list) else [listed]
    if odd := [token for token in ids if token is not None and not (type(token) is int and 0 <= token < MOST_TOKENS)]:
        odd_one = json.dumps(odd[0])[:80]
        what = f"{path} says that token {odd_one} ends an answer; a token is a number below {MOST_TOKENS:,}"
        raise DamagedFileError(what, str(path), "fetch or copy this file again")
    return ids


def load_tokenizer(folder: Path, chat_template_file: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a model folder.

    The pad token is the model's own; else a reserved or unknown token that is not the end of text; else the end of
    text, which is harmless because labels are masked by position and not by token.

    Args:
        folder: of a model in Hugging Face format.
        chat_template_file: a Jinja file, or the name of a template of the kit, that replaces the model's own.

    Raises:
        RecipeError: the folder has no tokenizer that transformers reads, or only a slow one; the template is missing
            or empty.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library's compiled part is no Exception
        raise RecipeError(
            f"the tokenizer in {folder} cannot be read: {_first_line(error)}", where="model.source"
        ) from error
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the tokenizer in {folder} has no fast version; the loss mask needs the character offsets that only a "
            "fast one gives",
            where="model.source",
            fix="use a base with a tokenizer.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _pad_token(tokenizer, folder)
    if chat_template_file is not None:
        tokenizer.chat_template = _template(chat_template_file)
        _check_named(tokenizer, chat_template_file)
    return tokenizer


def _pad_token(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> str:
    vocabulary = tokenizer.get_vocab()
    candidates = [*_RESERVED, tokenizer.unk_token, tokenizer.eos_token]
    ends = {tokenizer.eos_token}
    for token in candidates:
        if token is not None and token in vocabulary and token not in ends:
            return str(token)
    if tokenizer.eos_token is None:
        raise RecipeError(f"the tokenizer in {folder} has neither a pad token nor an end-of-text token")
    return str(tokenizer.eos_token)


def _check_named(tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
    """A template of the kit is of use only where its tokens are single tokens of the vocabulary."""
    missing = [token for token in CHAT_TEMPLATES.get(name, ()) if token not in tokenizer.get_vocab()]
    if missing:
        raise RecipeError(
            f"the tokenizer has no token {' and no '.join(missing)}, which the chat template {name} writes",
            where=f"model.chat_template={name}",
            fix="model.chat_template=null",
        )


def _template(name: str) -> str:
    if name in CHAT_TEMPLATES:
        return (resources.files("qlora_kit.model") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    path = typed_path(name)
    if not path.is_file():
        raise RecipeError(
            f"no such chat template file: {name}", where="model.chat_template", fix="model.chat_template=null"
        )
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise RecipeError(
            f"the chat template {name} is empty", where="model.chat_template", fix="model.chat_template=null"
        )
    return text


def _first_line(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    # The usual refusals explain themselves; of a TypeError its text alone says nothing.
    return (
        first if isinstance(error, (OSError, ValueError, ImportError)) and first else f"{type(error).__name__} {first}"
    )
