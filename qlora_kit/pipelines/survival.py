"""How much of what was learned is left in a file's weights, and a warning where that is little."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.say import say
from qlora_kit.export.delta_survival import DeltaSurvival, survey
from qlora_kit.export.merge import MergeReport
from qlora_kit.export.merging.deltas import Adapter, read_adapter
from qlora_kit.export.merging.names import checkpoint_names
from qlora_kit.export.merging.read_base import read_headers
from qlora_kit.export.stored_weights import WeightReader, stored_tensors
from qlora_kit.formats.dequantized import dequantized_weights
from qlora_kit.formats.job import ExportJob
from qlora_kit.schema.export import GgufMix, GptqMethod, MergeBase

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("gguf", "gptq", "awq", "awq_gemv", "bnb")  # whose weights are read back here
SMALL_GROUP = 32


def survival(job: ExportJob, folder: Path, merged: Path, merge: MergeReport, adapter: Path) -> DeltaSurvival | None:
    """Measure a written file; None where its weights are not read back, or where DoRA scaled whole rows.

    Args:
        folder: of the artifact.
        merged: the 16-bit folder that it was made from.
        merge: what was merged there.
        adapter: what training saved.
    """
    trained = read_adapter(adapter)
    scales_rows = any(update.magnitude is not None for update in trained.updates.values())
    if job.format not in FORMATS or scales_rows:
        return None
    artifact = folder if job.file == "." else folder / job.file
    found = survey(merged, _without(trained, merged), dequantized_weights(artifact, merged))
    is_on_original = merge.base == MergeBase.original.name
    found = replace(found, is_on_original=is_on_original, remedies=remedies(job.format, job.settings))
    if text := found.warning(job.name):
        say(f"warning: {text}")
    return found


def remedies(format_name: str, settings: Mapping[str, object]) -> tuple[str, ...]:
    """What keeps more of an update, from the nearest on: never what the file has already."""
    if format_name == "gguf":
        mixes = [mix.value for mix in GgufMix]  # more bits first
        mix = str(settings.get("mix"))
        at = mixes.index(mix) if mix in mixes else len(mixes)
        larger = [name for name in ("Q6_K", "Q8_0") if mixes.index(name) < at]
        if not larger:
            return () if mix in ("F16", "BF16") else ("16 bits (gguf_f16)",)
        more = f"more bits ({', '.join(f'gguf_{name.lower()}' for name in larger)})"
        return (more,) if settings.get("imatrix") else ("an importance matrix (imatrix: true)", more)
    if format_name == "gptq":
        is_plain = settings.get("method") == GptqMethod.rounding.value
        group, bits = _number(settings.get("group_size")), _number(settings.get("bits"))
        return (
            *(("GPTQ instead of plain rounding (method: gptq)",) if is_plain else ()),
            *(("smaller groups (group_size: 32)",) if group < 0 or group > SMALL_GROUP else ()),
            *(("8 bits (gptq_8bit)",) if bits < 8 else ()),
        )
    if format_name in ("awq", "awq_gemv"):
        # One number of bits, and the layout gemv has no small groups.
        finer = ("smaller groups (group_size: 32)",) if _is_coarse(settings) else ()
        return (*finer, "a format with more bits (gguf_q8_0, gptq_8bit)")
    if format_name == "bnb":
        return ("int8 (bnb_int8)",) if settings.get("kind") == "nf4" else ("a 16-bit folder (merged_16bit)",)
    return ("more bits",)


def _is_coarse(settings: Mapping[str, object]) -> bool:
    group = _number(settings.get("group_size"))
    return settings.get("layout") == "gemm" and (group < 0 or group > SMALL_GROUP)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def record(found: DeltaSurvival | None) -> dict[str, object]:
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
    read = stored_tensors(merged)
    named = checkpoint_names([f"{module}.weight" for module in adapter.updates], read_headers(merged))
    if len(named) != len(adapter.updates):
        raise RunError(f"{len(adapter.updates) - len(named)} modules of the adapter are not in {merged}")
    updates = {named[f"{module}.weight"]: update for module, update in adapter.updates.items()}

    def base_weight(name: str) -> "Tensor | None":
        update = updates.get(name)
        if update is None or update.embedding or (stored := read(name)) is None:
            return None
        weight = stored.float()
        learned = weight.new_zeros(weight.shape)
        update.load(weight.device).add(learned)
        return weight - learned

    return base_weight
