"""How much of what was learned is left in a file's weights, and a warning where that is little."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.adapter.updates import Adapter, read_adapter
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.core.units import counted
from qlora_kit.export.delta_retention import NAMED_LAYERS, DeltaRetention, survey
from qlora_kit.export.merge import MergeReport
from qlora_kit.formats.job import ExportJob
from qlora_kit.formats.registry import find_format
from qlora_kit.schema.export import MergeBase
from qlora_kit.weights.headers import read_headers
from qlora_kit.weights.reader import WeightReader, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor


def measured_retention(
    job: ExportJob, folder: Path, merged: Path, merge: MergeReport, adapter: Path
) -> DeltaRetention | None:
    """Measure a written file; None where its weights are not read back, or where DoRA scaled whole rows.

    Args:
        folder: of the artifact.
        merged: the 16-bit folder that it was made from.
        merge: what was merged there.
        adapter: what training saved.
    """
    trained = read_adapter(adapter)
    scales_rows = any(update.magnitude is not None for update in trained.updates.values())
    written = find_format(job.format)
    if (
        scales_rows
        or (read := written.dequantized_weights(folder if job.file == "." else folder / job.file, merged)) is None
    ):
        return None
    unread: list[str] | None = None if written.reads_every_weight else []
    try:
        found = survey(merged, _without(trained, merged), read, unread=unread)
    except RunError:
        if not unread:
            raise
        log.info(f"{job.name}: what is left of the update was not measured, since its reader reorders all weights")
        return None
    if unread:
        told = f"{counted(len(unread), 'weight')} ({', '.join(unread[:NAMED_LAYERS])})"
        log.info(f"{job.name}: what is left of the update was not measured in {told}, whose rows the file reorders")
    is_on_original = merge.base == MergeBase.original.name
    found = replace(found, is_on_original=is_on_original, remedies=written.remedies(job.settings))
    if text := found.warning(job.name):
        log.warning(text)
    return found


def record(found: DeltaRetention | None) -> dict[str, object]:
    """A manifest's entry: the share kept, rounding noise by the update's size, the weight that kept the least.

    `kinds` has the same by kind of layer; `warning` is what the user was told, empty where all is well.
    """
    if found is None:
        return {}
    kinds = {
        kind: {"kept": of_kind.kept, "worst_kept": of_kind.worst.kept} for kind, of_kind in found.by_kind().items()
    }
    worst = found.worst
    return {
        "kept": found.kept,
        "noise": found.noise,
        "worst": worst.name,
        "worst_kept": worst.kept,
        "kinds": kinds,
        "warning": found.warning("the file") or "",
    }


def _without(adapter: Adapter, merged: Path) -> WeightReader:
    """The weights that the updates were added to, as the merged ones less their updates."""
    from qlora_kit.model.stored_names import stored_names

    read = stored_tensors(merged)
    tensors = read_headers(merged)
    names = stored_names(merged, tensors)
    named = {module: names.by_own.get(f"{module}.weight", f"{module}.weight") for module in adapter.updates}
    updates = {
        named[module]: replace(update, flipped=named[module] in names.flipped)
        for module, update in adapter.updates.items()
    }
    if missing := updates.keys() - tensors.keys():
        raise RunError(f"{len(missing)} modules of the adapter are not in {merged}")

    def base_weight(name: str) -> "Tensor | None":
        update = updates.get(name)
        if update is None or update.embedding or (stored := read(name)) is None:
            return None
        weight = stored.float()
        learned = weight.new_zeros(weight.shape)
        update.load(weight.device).add(learned)
        return weight - learned

    return base_weight
