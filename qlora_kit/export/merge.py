"""Merges a trained adapter into its base: tensor by tensor, added in fp32, written in bf16."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.adapter.updates import Adapter, read_adapter, refuse_unlearned
from qlora_kit.core.console.bar import BYTES, bar
from qlora_kit.core.errors import RunError
from qlora_kit.core.units import human_bytes
from qlora_kit.export.merging.audit import audit_changes, audit_folder, changes_hash
from qlora_kit.export.merging.carry import carry_files, says_tied
from qlora_kit.export.merging.plan import Plan, make_plan
from qlora_kit.export.merging.resume import Journal, inputs_hash, take_up
from qlora_kit.export.merging.rounded import Rounding, is_stored_rounded, rounded_modules
from qlora_kit.export.merging.write_shards import Written, write_shards
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.microscaled import read_weights
from qlora_kit.weights.names import tensor_shapes

ROOM_FOR_SMALL_FILES = 50_000_000  # bytes; tokenizer and settings


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Attributes:
        adapted: modules that the adapter updates.
        merged: those of them that were merged.
        base: what the update was added to.
        saved: tensors that the adapter holds in full and that took the base's place.
        unlearned: adapted modules whose update is zero.
        changed: tensors with a value that differs from the base's, in bf16.
        changed_sha256: over the names and checksums of those.
        tied: whether the head is the embedding.
        untied: whether the base's was and the trained one is not.
        size: bytes of the weights.
        resumed: of these, bytes that an earlier, killed merge had written.
    """

    adapted: int
    merged: int
    base: str = ""
    saved: int = 0
    unlearned: int = 0
    changed: int = 0
    changed_sha256: str = ""
    tied: bool = False
    untied: bool = False
    size: int = 0
    resumed: int = 0
    seconds: float = 0.0


def adapted_modules(adapter: Path) -> int:
    """Modules with a LoRA update in a saved adapter, by its tensors."""
    return sum(".lora_A." in name or name.endswith(".lora_embedding_A") for name in tensor_shapes(adapter))


def merge(
    base_folder: Path, adapter: Path, quant: QuantConfig, merge_base: MergeBase, tokenizer: Any, out: Path
) -> MergeReport:
    """Write the merged model as bf16 safetensors with tokenizer, generation config and licenses.

    What a base holds in fp32 beside narrower weights stays as it is: see `wide_tensors`.

    `dequantized` adds the update to exactly the weights that it was trained on; `original` to the 16-bit weights.
    Neither rounds back to 4 bit, which loses about half of what a small model learned. A base that is stored in 4 or
    8 bit is read back, whatever `merge_base` says. The folder is checked as it lies on disk.

    A merge that was killed goes on behind the last file that it finished, if everything that it is made from is the
    same; the weights of any other are removed.

    Args:
        out: an existing folder, empty or of a merge that was killed.
    Raises:
        RunError: a file of the base is damaged, the adapter is of another base or learned nothing, there is no room,
            or the merged folder does not pass its audit.
    """
    from qlora_kit.model.device import this_device
    from qlora_kit.model.stored_names import stored_names

    began = time.perf_counter()
    trained = read_adapter(adapter)
    zero = refuse_unlearned(trained)
    stored = is_stored_rounded(base_folder)
    as_trained = stored or (merge_base is not MergeBase.original and quant.kind is not QuantKind.none)
    base = read_weights(base_folder)
    rounded = _rounded(base_folder, trained, quant, stored, as_trained)
    names = stored_names(base_folder, base)
    plan = make_plan(base, trained, says_tied(base_folder), rounded, as_trained, names)
    rounding = Rounding(quant, this_device())
    journal = take_up(out, plan, inputs_hash(base.values(), adapter, plan, rounding))
    resumed = sum(piece.size for name in journal.finished for piece in plan.shards[name])
    refuse_full_disk(plan.size - resumed, out)
    written = _write(plan, rounding, out, journal)
    carry_files(base_folder, plan, out)
    tokenizer.save_pretrained(out)
    _audit(plan, written, zero)
    tokens = _tokens(base_folder, plan, names.embedding, tokenizer)
    audit_folder(out, base_folder, base, names, tokens, plan.wide)
    report = _report(plan, written, trained, adapter)
    return replace(
        report,
        base=MergeBase.dequantized.name if as_trained else MergeBase.original.name,
        unlearned=len(zero),
        resumed=resumed,
        seconds=round(time.perf_counter() - began, 2),
    )


def refuse_full_disk(needed: int, out: Path, what: str = "the merged model") -> None:
    """Refuse to begin what will not fit.

    Args:
        needed: bytes.
        what: needs them, in words.

    Raises:
        RunError: with what is needed and what is free, in bytes.
    """
    free = shutil.disk_usage(out).free
    if needed + ROOM_FOR_SMALL_FILES > free:
        raise RunError(
            f"{what} takes {human_bytes(needed)}, and {human_bytes(free)} are free on the disk of {out}",
            where=str(out),
            fix=f"free {human_bytes(needed + ROOM_FOR_SMALL_FILES - free)} there",
        )


def _rounded(base_folder: Path, trained: Adapter, quant: QuantConfig, stored: bool, as_trained: bool) -> set[str]:
    """The modules that were rounded in training, where the merge has to know them."""
    starts = any(update.init for update in trained.updates.values())
    return rounded_modules(base_folder, quant) if not stored and (as_trained or starts) else set()


def _write(plan: Plan, rounding: Rounding, out: Path, journal: Journal) -> list[Written]:
    with bar("merge", plan.size, BYTES) as one:
        written = write_shards(plan, rounding, out, one.advance, journal.finished, journal.record)
    journal.close()
    return written


def _report(plan: Plan, written: list[Written], trained: Adapter, adapter: Path) -> MergeReport:
    adapted, merged = adapted_modules(adapter), len({piece.update.module for piece in plan.pieces if piece.update})
    if merged != adapted:
        raise RunError(f"the adapter touches {adapted} modules, but {merged} were merged")
    return MergeReport(
        adapted=adapted,
        merged=merged,
        saved=len(trained.replaced),
        changed=sum(tensor.changed for tensor in written),
        changed_sha256=changes_hash(written),
        tied=plan.tied,
        untied=plan.untied,
        size=plan.size,
    )


def _audit(plan: Plan, written: list[Written], zero: set[str]) -> None:
    updated = {piece.name: piece.update.module for piece in plan.pieces if piece.update}
    of_stacks = {piece.name for piece in plan.pieces if piece.stack}  # an expert that no token reached learned nothing
    expected = {name for name, module in updated.items() if module not in zero and name not in of_stacks}
    optional = {piece.name for piece in plan.pieces if piece.touched} - expected
    audit_changes(written, expected, optional)
    changed = {updated.get(tensor.name) for tensor in written if tensor.changed}
    learned = {updated[name] for name in of_stacks if name in updated} - zero
    if unchanged := sorted(learned - changed):
        what = f"the merge left {len(unchanged)} of {len(learned)} stacks of experts as they were"
        raise RunError(f"{what}: {unchanged[0]}")


def _tokens(base_folder: Path, plan: Plan, embedding: str, tokenizer: Any) -> int | None:
    """Length of the tokenizer; None where the base itself ships one that is longer than its embedding."""
    from qlora_kit.model.tokenizer import load_tokenizer

    rows = [piece.shape[0] for piece in plan.pieces if piece.name == embedding]
    if not rows or len(tokenizer) <= rows[0]:
        return len(tokenizer)
    return None if len(load_tokenizer(base_folder)) >= len(tokenizer) else len(tokenizer)
