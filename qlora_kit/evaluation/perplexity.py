"""Perplexity of a text file, in windows, through the same scoring as the held-out rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.intervals import Interval, mean_by_row
from qlora_kit.evaluation.scores import Scorer, perplexity_of

_CHARACTERS_A_TOKEN = 8  # first guess of how much to read; twice as much again where it was too little
_UNSETTLED = 16  # tokens at the end of a piece of text that its continuation might have made differently


@dataclass(frozen=True)
class TextFit:
    """How well a model predicts a text: perplexity with its interval by window, over so many tokens."""

    perplexity: float
    interval: Interval | None
    tokens: int
    windows: int


def text_windows(
    path: Path, tokenizer: Any, bos: int | None, window: int, stride: int | None = None, most: int | None = None
) -> list[TokenRow]:
    """Cut the start of a text file into rows of which every token is predicted once.

    Args:
        path: UTF-8 text; no more of it is read than the windows need.
        tokenizer: a transformers tokenizer; nothing special is put into the text.
        bos: put in front of every window. Without it the first token of the text, and of every window where windows do
            not overlap, has nothing before it and is not counted, as in transformers' own guide to perplexity.
        window: tokens of a window, `bos` among them.
        stride: tokens from one window to the next; only those that no earlier window predicted count. None does not
            overlap.
        most: windows at most.

    Raises:
        RecipeError: no such file, not UTF-8, or too short; or a stride longer than a window.
    """
    front = [] if bos is None else [bos]
    room = window - len(front)
    step = room if stride is None else stride
    if step > room:
        what = f"eval.text_stride={stride} is longer than a window's {room} tokens of text, so some would be skipped"
        raise RecipeError(what, "eval.text_stride", f"eval.text_stride={room}")
    needed = None if most is None else room + (most - 1) * step
    tokens = _first_tokens(path, tokenizer, needed)
    rows = [row for row in _cut(tokens, front, room, step, str(path)) if any(row.trained[1:])][:most]
    if not rows:
        raise RecipeError(f"{path} holds {counted(len(tokens), 'token')}, too few to predict one", "eval.text_file")
    return rows


def text_fit(scorer: Scorer, windows: Sequence[TokenRow]) -> TextFit:
    """Perplexity of the windows of a text; the logits of one window are held at a time."""
    targets = [scorer.score([row], None, 1).target for row in windows]
    losses = -torch.cat(targets)
    rows = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor([len(target) for target in targets]))
    interval = mean_by_row(losses, rows)
    around = None if interval is None else (perplexity_of(interval[0]), perplexity_of(interval[1]))
    return TextFit(perplexity_of(float(losses.mean())), around, len(losses), len(targets))


def _cut(tokens: Sequence[int], front: list[int], room: int, step: int, file: str) -> Iterator[TokenRow]:
    done = 0
    for number in range(max(1, math.ceil((len(tokens) - room) / step) + 1)):
        begin = number * step
        piece = tokens[begin : begin + room]
        ids = (*front, *piece)
        old = len(front) + done - begin
        yield TokenRow(ids, tuple(place >= old for place in range(len(ids))), file, number + 1)
        done = begin + len(piece)


def _first_tokens(path: Path, tokenizer: Any, needed: int | None) -> list[int]:
    """The first tokens of a file, or all of them."""
    size = None if needed is None else needed * _CHARACTERS_A_TOKEN
    while True:
        text, is_whole = _read(path, size)
        ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        if size is None or needed is None or is_whole:
            return ids[:needed]
        if len(ids) >= needed + _UNSETTLED:
            return ids[:needed]
        size *= 2


def _read(path: Path, characters: int | None) -> tuple[str, bool]:
    try:
        # Line ends as they are: translated, they would be other tokens.
        with path.open(encoding="utf-8", newline="") as stream:
            text = stream.read(-1 if characters is None else characters)
            return text, not stream.read(1)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "eval.text_file", "eval.text_file=null") from error
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 text: byte {error.start} of what was read is {error.object[error.start]:#04x}"
        raise RecipeError(what, "eval.text_file", "eval.text_file=<a UTF-8 text file>") from error
