"""Names the rows that scores are of, so that scores of the same rows can be told from others."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from qlora_kit.data.tokens import TokenRow


def scored_on(rows: Sequence[TokenRow]) -> dict[str, object]:
    """How many rows, of which files, and a SHA-256 of their token ids and of which tokens are trained."""
    digest = sha256()
    for row in rows:
        digest.update(np.array([len(row.input_ids), *row.input_ids], dtype=np.uint32).tobytes())
        digest.update(np.array(row.trained, dtype=np.bool_).tobytes())
    return {"rows": len(rows), "files": sorted({row.file for row in rows}), "sha256": digest.hexdigest()}
