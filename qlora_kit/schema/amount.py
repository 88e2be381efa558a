"""An amount of memory, or a word for one, as recipes write it: read here and nowhere else."""

import math
import re
from dataclasses import dataclass
from enum import Enum

_UNITS = {"MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}


class Amount(Enum):
    """How much of something a recipe asks for."""

    auto = "auto"
    none = "none"
    all = "all"
    budget = "budget"


@dataclass(frozen=True)
class Asked:
    """`engine.recompute` or `engine.cached_weights`, read.

    Attributes:
        budget_bytes: for all that is kept together; 0 unless `amount` is budget.
    """

    amount: Amount
    budget_bytes: float = 0.0


def parse_amount(text: str) -> Asked:
    """Read `auto`, `none`, `all`, or a budget such as `20GB`, `1.5 GiB` or `512MB`, in any case.

    Raises:
        ValueError: the text is none of these, or the budget is nothing; the message says what is allowed.
    """
    word = text.strip()
    if word.lower() in ("auto", "none", "all"):
        return Asked(Amount(word.lower()))
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", word, re.ASCII | re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ValueError(f"{text!r} is none of auto, none, all, and no amount of memory such as 20GB")
    return Asked(Amount.budget, float(match[1]) * _UNITS[match[2].upper()])
