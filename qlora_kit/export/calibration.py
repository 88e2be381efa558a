"""The rows that GPTQ and AWQ look at: the recipe's own training rows, rendered with its template."""

from collections.abc import Sequence

from qlora_kit.data.tokens import TokenRow


def calibration_rows(train: Sequence[TokenRow], count: int) -> list[list[int]]:
    """Token ids of `count` rows spread evenly over the training rows; all of them if there are fewer."""
    step = max(1, len(train) // count)
    return [list(row.input_ids) for row in train[::step][:count]]
