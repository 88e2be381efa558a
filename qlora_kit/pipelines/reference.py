"""What every file of an export is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.judge import Yardstick
from qlora_kit.evaluation.scores import Scores


@dataclass(frozen=True)
class Reference:
    """What files are compared with: scores of the trained model, or of the base, on held-out rows.

    Attributes:
        twins: mean KL of the rounded 16-bit model by its folder and bits, as far as it was asked for.
    """

    rows: Sequence[TokenRow]
    yardstick: Yardstick
    twins: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """Of the trained model, or the base that is exported."""
        return self.yardstick.reference
