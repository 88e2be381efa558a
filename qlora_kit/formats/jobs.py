"""Every export that a recipe names, as a job that fills a folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_kit.adapter.saved import BaseName
from qlora_kit.formats.adapter.write import write_adapter
from qlora_kit.schema.export import (
    AdapterFormat,
    AdapterTarget,
    AwqLayout,
    AwqTarget,
    BnbTarget,
    CompressedTarget,
    ExportConfig,
    GgufTarget,
    GptqTarget,
)

if TYPE_CHECKING:
    from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
    from qlora_kit.formats.spend import Spent

Rows = Sequence[Sequence[int]]
Mixing = TypeVar("Mixing", GgufTarget, GptqTarget)
# What scores each format here, as a user would load it.
READERS = {
    "merged": "transformers",
    "gguf": "llama.cpp",
    "gptq": "transformers with gptqmodel",
    "awq": "transformers with gptqmodel",
    "awq_gemv": "transformers with gptqmodel, without a GPU its gemm twin",
    "compressed": "transformers with compressed-tensors",
    "bnb": "transformers with bitsandbytes",
    "adapter": "peft",
    "adapter_gguf": "llama.cpp",
}


@dataclass(frozen=True)
class Source:
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
    calibration: Rows


@dataclass(frozen=True)
class ExportJob:
    """One artifact: its folder's name, its format, the path inside it that a reader opens, and how it is made.

    `write` fills a folder and says what a budget of bits was spent on, where there is one. `left` records the layers
    that stay in 16 bit by the format's limits, where there are any.
    """

    name: str
    format: str
    file: str
    settings: dict[str, object]
    write: "Callable[[Path], Spent | None]"
    left: Mapping[str, object] = field(default_factory=dict)


def export_jobs(export: ExportConfig, source: Source) -> Iterator[ExportJob]:
    """The jobs of a recipe, quick ones first."""
    merged, rows = source.merged, source.calibration
    for name, adapter in export.adapter.items():
        yield _adapter(name, adapter, source)
    for name, sixteen in export.merged.items():
        yield ExportJob(name, "merged", ".", settings_of(sixteen), partial(_copy, merged))
    for name, bnb in export.bnb.items():
        yield ExportJob(name, "bnb", ".", settings_of(bnb), partial(_bnb, merged, bnb))
    yield from _gguf(with_budgets(export.gguf, export), merged, source.name, rows)
    for name, compressed in export.compressed.items():
        yield ExportJob(
            name, "compressed", ".", settings_of(compressed), partial(_compressed, merged, compressed, rows)
        )
    for name, gptq in with_budgets(export.gptq, export).items():
        yield ExportJob(name, "gptq", ".", settings_of(gptq), partial(_gptq, merged, gptq, rows))
    for name, awq in export.awq.items():
        kind = "awq" if awq.layout is AwqLayout.gemm else "awq_gemv"
        yield ExportJob(name, kind, ".", settings_of(awq), partial(_awq, merged, awq, rows))


def with_budgets(targets: Mapping[str, Mixing], export: ExportConfig) -> dict[str, Mixing]:
    """Targets with the shared budget of bits, where they have none of their own."""
    return {
        name: replace(target, bits_budget=export.bits_budget) if target.bits_budget is None else target
        for name, target in targets.items()
    }


def settings_of(target: Any) -> dict[str, object]:
    """A target's fields as JSON values."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(target).items()}


def _copy(merged: Path, out: Path) -> None:
    shutil.copytree(merged, out, dirs_exist_ok=True)


def _gguf(targets: dict[str, GgufTarget], merged: Path, model_name: str, calibration: Rows) -> Iterator[ExportJob]:
    if not targets:
        return
    from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
    from qlora_kit.formats.gguf.target import gguf_file_name

    imatrix = ImportanceMatrix(merged, calibration)  # one for all files, measured when the first one needs it
    for name, target in targets.items():
        write = partial(_write_gguf, merged, target, model_name, imatrix)
        yield ExportJob(name, "gguf", gguf_file_name(merged, target, model_name), settings_of(target), write)


def _write_gguf(
    merged: Path, target: GgufTarget, model_name: str, imatrix: "ImportanceMatrix", out: Path
) -> "Spent | None":
    from qlora_kit.formats.gguf.target import write_gguf_target
    from qlora_kit.formats.spend import spend_gguf

    spent = None
    if target.bits_budget is not None:
        target, spent = spend_gguf(merged, target, target.bits_budget, imatrix)
    write_gguf_target(merged, target, model_name, imatrix, out)
    return spent


def _adapter(name: str, target: AdapterTarget, source: Source) -> ExportJob:
    is_gguf = target.format is AdapterFormat.gguf
    file = f"{source.name}.adapter.gguf" if is_gguf else "."
    write = partial(_write_adapter, source, target, file)
    return ExportJob(name, "adapter_gguf" if is_gguf else "adapter", file, settings_of(target), write)


def _write_adapter(source: Source, target: AdapterTarget, file: str, out: Path) -> None:
    write_adapter(source.adapter, source.merged, out, target, source.base, file)


def _bnb(merged: Path, target: BnbTarget, out: Path) -> None:
    from qlora_kit.formats.bnb.write import write_bnb

    write_bnb(merged, out, target)


def _compressed(merged: Path, target: CompressedTarget, calibration: Rows, out: Path) -> None:
    from qlora_kit.formats.compressed.write import write_compressed

    write_compressed(merged, out, target, calibration)


def _gptq(merged: Path, target: GptqTarget, calibration: Rows, out: Path) -> "Spent | None":
    from qlora_kit.formats.gptq.write import write_gptq
    from qlora_kit.formats.spend import spend_gptq

    spent = None
    if target.bits_budget is not None:
        target, spent = spend_gptq(merged, target, target.bits_budget, calibration)
    write_gptq(merged, out, target, calibration)
    return spent


def _awq(merged: Path, target: AwqTarget, calibration: Rows, out: Path) -> None:
    from qlora_kit.formats.awq.write import write_awq

    write_awq(merged, out, target, calibration)
