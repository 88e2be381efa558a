"""A GPU that is not at hand, by its size or its name."""

import difflib
import re
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError

CONTEXT_BYTES = 0.5e9  # that CUDA takes of a card before anything is loaded; 0.5 to 0.6 GB on an H200
GIGABYTE = 1e9  # as sold, a card has up to 7% more: that much is not counted on
MOST_GIGABYTES = 1000  # of a number without a unit more are part of a name, as in 4090
CARDS = {
    "rtx_3060": 12,
    "rtx_4060_ti": 16,
    "rtx_4070_ti_super": 16,
    "rtx_4080": 16,
    "rtx_5080": 16,
    "t4": 15,
    "rtx_3090": 24,
    "rtx_4090": 24,
    "l4": 24,
    "a10": 22,
    "rtx_5090": 32,
    "v100": 32,
    "a100_40gb": 40,
    "a6000": 48,
    "l40s": 48,
    "a100_80gb": 80,
    "h100": 80,
    "rtx_pro_6000": 96,
    "gh200": 96,
    "h200": 141,
    "b200": 180,
}


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: empty where its size was asked for.
        gigabytes: of it.
    """

    name: str
    gigabytes: float

    @property
    def free_bytes(self) -> float:
        """What a run can have."""
        return self.gigabytes * GIGABYTE - CONTEXT_BYTES


def card_of(text: str) -> Card:
    """A card by its name, as `rtx_4090` or `RTX 4090`, or by its size, as `24GB`.

    Raises:
        RecipeError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB|G)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match and CONTEXT_BYTES / GIGABYTE < float(match[1]) <= MOST_GIGABYTES:
        return Card("", float(match[1]))
    name = re.sub(r"[ -]+", "_", text.strip().lower()).removeprefix("nvidia_").removeprefix("geforce_")
    if name in CARDS:
        return Card(name, CARDS[name])
    inside = (known for known in CARDS if name and name in known.split("_"))
    alike = [] if match else difflib.get_close_matches(name, CARDS, n=1, cutoff=0.8)
    fix = next((f"card={known}" for known in (*inside, *alike)), "card=24GB")
    known = ", ".join(CARDS)
    raise RecipeError(f"no card is called {text!r}: it is a size in GB, such as 24GB, or one of {known}", "card", fix)
