"""Token rows with random ids, in a store on disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_kit.data.tokens import TokenRows
from tests.stored_rows import stored_rows


def drawn_rows(folder: Path, lengths: Sequence[int], seed: int = 0) -> TokenRows:
    """Rows of these lengths with random ids from 5 to 499; a random tail of each is trained."""
    draw = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        first = int(draw.integers(0, length))
        rows.append((draw.integers(5, 500, length).tolist(), [place >= first for place in range(length)]))
    return stored_rows(folder, rows)
