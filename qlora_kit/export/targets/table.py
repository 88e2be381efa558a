"""Every export that a recipe names, as a job that fills a folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from qlora_kit.schema.export import AwqTarget, ExportConfig, GgufTarget, GptqTarget

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ExportJob:
    """One artifact: its folder's name, its format, the path inside it that a reader opens, and how it is made."""

    name: str
    format: str
    file: str
    settings: dict[str, object]
    write: Callable[[Path], None]


def export_jobs(export: ExportConfig, merged: Path, model_name: str, calibration: Rows) -> Iterator[ExportJob]:
    """The jobs of a recipe, quick ones first.

    Args:
        merged: folder of the merged 16-bit model.
        model_name: first part of a GGUF file's name.
        calibration: token ids of rows for the formats that look at activations.
    """
    for name, sixteen in export.merged.items():
        yield ExportJob(name, "merged", ".", settings_of(sixteen), partial(_copy, merged))
    for name, gguf in export.gguf.items():
        file = f"{model_name}.{gguf.mix.value}.gguf"
        yield ExportJob(name, "gguf", file, settings_of(gguf), partial(_gguf, merged, gguf, file))
    for name, gptq in export.gptq.items():
        yield ExportJob(name, "gptq", ".", settings_of(gptq), partial(_gptq, merged, gptq, calibration))
    for name, awq in export.awq.items():
        yield ExportJob(name, "awq", ".", settings_of(awq), partial(_awq, merged, awq, calibration))


def settings_of(target: Any) -> dict[str, object]:
    """A target's fields as JSON values."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(target).items()}


def _copy(merged: Path, out: Path) -> None:
    shutil.copytree(merged, out, dirs_exist_ok=True)


def _gguf(merged: Path, target: GgufTarget, file: str, out: Path) -> None:
    from qlora_kit.export.gguf.writer import write_gguf

    write_gguf(merged, out / file, target.mix.value)


def _gptq(merged: Path, target: GptqTarget, calibration: Rows, out: Path) -> None:
    from qlora_kit.export.targets.gptq import write_gptq

    write_gptq(merged, out, target, calibration)


def _awq(merged: Path, target: AwqTarget, calibration: Rows, out: Path) -> None:
    from qlora_kit.export.targets.awq import write_awq

    write_awq(merged, out, target, calibration)
