"""Text of many kinds that the kit ships: stories, talk, code, sums, tables, a dozen languages.

A model that was calibrated on its own task alone may lose what it still needs around it. The passages were written for
this kit.
"""

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BETWEEN_PASSAGES = "\n%%\n"


@cache
def passages() -> tuple[str, ...]:
    """Every passage, in the order of the file."""
    text = files("qlora_kit.export").joinpath("assets", "general_text.txt").read_text(encoding="utf-8")
    return tuple(text.strip("\n").split(_BETWEEN_PASSAGES))


def general_rows(tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int) -> list[list[int]]:
    """Rows of general text, cut from the passages one after another in an order that the seed decides.

    Args:
        tokenizer: the model's; a beginning-of-text token is put first where it would put one.
        count: rows wanted; fewer where the text is used up, as no token comes twice.
        length: tokens of each row.
        seed: of the order of the passages.
    """
    start = _beginning(tokenizer)
    texts = passages()
    order = np.random.default_rng(seed).permutation(len(texts))
    stream: list[int] = []
    for index in order:
        stream += tokenizer(texts[index] + "\n\n", add_special_tokens=False)["input_ids"]
    step = length - len(start)
    available = len(stream) // step
    if count >= available:
        places = range(available)
    else:
        # spread over the text, so that few rows still see many kinds
        places = np.linspace(0, available - 1, count).round().astype(int).tolist()
    return [start + stream[place * step : (place + 1) * step] for place in places]


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    has_beginning = bool(full) and full[0] == tokenizer.bos_token_id and full[0] != plain[0]
    return [full[0]] if has_beginning else []
