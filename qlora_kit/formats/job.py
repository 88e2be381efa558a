"""What is to be written: a job for each artifact that fills a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.saved import BaseName
from qlora_kit.export.uncalibrated import Uncalibrated

if TYPE_CHECKING:
    from qlora_kit.export.budget.choose import Allocation


@dataclass(frozen=True)
class Written:
    """What is told of how a file was made.

    Attributes:
        allocation: what a budget of bits was spent on; None without one.
        uncalibrated: what calibration rows told nothing of; None where none are looked at.
    """

    allocation: "Allocation | None" = None
    uncalibrated: Uncalibrated | None = None


@dataclass(frozen=True)
class ExportSource:
    """What every export is made from.

    Attributes:
        merged: folder of the merged 16-bit model.
        adapter: folder of the trained adapter.
        base: what the adapter belongs to.
        name: first part of a GGUF file's name.
        calibration: token ids of rows for the formats that look at activations.
    """

    merged: Path
    adapter: Path
    base: BaseName
    name: str
    calibration: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ExportJob:
    """One artifact: its folder's name, its format, the path inside it that a reader opens, and how it is made.

    `write` fills a folder and says how, where there is something to say. `unquantized` records the layers that stay in
    16 bit by the format's limits, where there are any.
    """

    name: str
    format: str
    file: str
    settings: dict[str, object]
    write: "Callable[[Path], Written | None]"
    unquantized: Mapping[str, object] = field(default_factory=dict)


def settings_of(target: Any) -> dict[str, object]:
    """A target's fields as JSON values."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(target).items()}
