"""Rows of chat for benchmarks that go through the command line: of mixed length, or all as long as they may be."""

import json
import random
from pathlib import Path
from typing import Any

MIXED_ROWS = 1200
FULL_ROWS = 400


def write_mixed(tokenizer: Path, place: Path) -> None:
    """Rows of mixed length, 870 tokens on average with SmolLM2's tokenizer."""
    draw, words = random.Random(0), _words(_tokenizer(tokenizer))
    _write(place, [[_text(draw, words, 20, 120), _text(draw, words, 60, 300)] for _ in range(MIXED_ROWS)])


def write_full(tokenizer: Path, place: Path, tokens: int) -> None:
    """Rows of almost so many tokens, and no more, each with the template around it."""
    speech, draw = _tokenizer(tokenizer), random.Random(0)
    words = _words(speech)
    rows = []
    for _ in range(FULL_ROWS):
        asked, answer = _text(draw, words, 5, 20), _text(draw, words, tokens, tokens).split(" ")
        long = _length(speech, asked, " ".join(answer))
        answer = answer[: len(answer) * tokens // long]
        while answer and _length(speech, asked, " ".join(answer)) > tokens:
            answer = answer[:-4]
        rows.append([asked, " ".join(answer)])
    _write(place, rows)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _words(tokenizer: Any) -> list[str]:
    return [word for word in tokenizer.get_vocab() if word.isalpha()][:4000]


def _text(draw: random.Random, words: list[str], shortest: int, longest: int) -> str:
    return " ".join(draw.choice(words) for _ in range(draw.randint(shortest, longest)))


def _length(tokenizer: Any, asked: str, answer: str) -> int:
    return len(tokenizer(tokenizer.apply_chat_template(_turns([asked, answer]), tokenize=False))["input_ids"])


def _turns(row: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), row, strict=True)]


def _write(place: Path, rows: list[list[str]]) -> None:
    with place.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps({"messages": _turns(row)}) + "\n")
