"""How a verb ends whose files failed or were rejected, with what brings each closer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_kit.core.errors import FidelityError, RecipeError, RunError
from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.exported import Exported
from qlora_kit.export.manifest import read_manifest
from qlora_kit.formats.registry import FORMATS
from qlora_kit.runs.directory import MANIFEST


def raise_what_went_wrong(done: Sequence[Exported]) -> None:
    """End as the worst of the exports did.

    Raises:
        RunError: one failed; the others are written.
        FidelityError: one is rejected.
    """
    failed = [export for export in done if export.error]
    rejected = [export for export in done if export.verdict is Verdict.rejected]
    if failed:
        raise RunError("\n".join(f"{export.name} was not written: {export.error}" for export in failed))
    if rejected:
        raise FidelityError(rejection({export.folder: export.faults for export in rejected}))


def rejection(faults: Mapping[Path, Sequence[str]]) -> str:
    """What an error says of rejected files, by folder, with what brings each closer."""
    lines = []
    for folder, found in faults.items():
        lines += [f"{folder.name} is rejected: {fault}" for fault in found]
        closer = _closer(folder) if any("mean KL" in fault for fault in found) else ()
        lines += [f"  closer is {'; or '.join(closer)}"] if closer else []
    return "\n".join(lines)


def _closer(folder: Path) -> tuple[str, ...]:
    """What comes closer than a file, in the words of its own format."""
    try:
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    except RecipeError:  # its fault is told elsewhere
        manifest = {}
    written = FORMATS.get(str(manifest.get("format", "")))
    if written is None:
        return ()
    rows = ("more rows to calibrate on (export.calibration_rows)",) if written.is_calibrated else ()
    return (*written.remedies(dict(manifest.get("settings") or {})), *rows)
