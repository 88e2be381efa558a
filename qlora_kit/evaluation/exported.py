"""How an export ended."""

from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.scores import Fidelity


@dataclass(frozen=True)
class Exported:
    """How an export ended.

    Attributes:
        seconds: that writing it took.
        fidelity: None without held-out rows.
        verdict: None for a file that was not written.
        faults: why the file must not be served; none for a good one.
        error: why there is no file.
    """

    name: str
    folder: Path
    seconds: float
    fidelity: Fidelity | None = None
    verdict: Verdict | None = None
    faults: tuple[str, ...] = ()
    error: str = ""
