"""The 16-bit folder that every format is made from: a base with its adapter merged in, or a copy of the base alone."""

import time
from pathlib import Path
from typing import Any

from qlora_kit.adapter.updates import Adapter
from qlora_kit.core.console.bar import BYTES, bar
from qlora_kit.core.console.lines import log
from qlora_kit.core.units import counted, human_bytes, human_seconds
from qlora_kit.export.merge import MergeReport, merge, refuse_full_disk
from qlora_kit.export.merging.audit import audit_folder
from qlora_kit.export.merging.carry import carry_files, says_tied
from qlora_kit.export.merging.plan import make_plan
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.export.merging.write_shards import write_shards
from qlora_kit.runs.run import Run
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import read_headers
from qlora_kit.weights.microscaled import read_weights


def write_sixteen_bit(run: Run, merge_base: MergeBase, out: Path) -> MergeReport:
    """Fill a folder with a run's weights in 16 bit, and say so.

    Args:
        merge_base: that the adapter is merged into.
        out: an existing folder; after a kill, that of the same inputs is gone on with.

    Raises:
        RunError: a file is damaged, there is no room, or the folder does not pass its audit.
    """
    if not run.trained:
        copied = copy_base(run.base.folder, run.tokenizer, out)
        wider = sorted(_rounded_kinds(run.base.folder, out) & {"F64", "F32", "F16"})
        rounded = f" rounded from {' and '.join(wider)} to BF16," if wider else ""
        log.info(f"copied the base,{rounded} {human_bytes(copied.size)} in {human_seconds(copied.seconds)}")
        return copied
    began = time.perf_counter()
    report = merge(run.base.folder, run.directory.adapter, run.quant, merge_base, run.tokenizer, out)
    seconds = human_seconds(time.perf_counter() - began)
    before = f", {human_bytes(report.resumed)} of it written before" if report.resumed else ""
    modules = f"{report.merged:,} of {counted(report.adapted, 'module')}"
    log.info(f"merged {modules} into the {report.base} base in {seconds}{before}")
    return report


def _rounded_kinds(base: Path, copied: Path) -> set[str]:
    """How tensors of a base are stored whose copies are stored otherwise."""
    kinds = {name: tensor.dtype for name, tensor in read_headers(copied).items()}
    return {
        tensor.dtype for name, tensor in read_weights(base).items() if kinds.get(name, tensor.dtype) != tensor.dtype
    }


def copy_base(base_folder: Path, tokenizer: Any, out: Path) -> MergeReport:
    """Copy a base tensor by tensor, and check the folder as a merge is checked.

    Floats are rounded to bf16, but for `wide_tensors`.

    Args:
        base_folder: a model in 16 or 32 bit.
        out: an existing, empty folder.
    Returns:
        A report with no module adapted.
    Raises:
        RunError: a file of the base is damaged, there is no room, or the folder does not pass its audit.
    """
    from qlora_kit.model.device import this_device
    from qlora_kit.model.stored_names import stored_names

    began = time.perf_counter()
    base = read_weights(base_folder)
    names = stored_names(base_folder, base)
    plan = make_plan(base, Adapter(base_folder, {}, {}), says_tied(base_folder), (), merge_rounded=False, names=names)
    refuse_full_disk(plan.size, out, "the copy of the base")
    with bar("copy", plan.size, BYTES) as one:
        write_shards(plan, Rounding(QuantConfig(kind=QuantKind.none), this_device()), out, one.advance)
    carry_files(base_folder, plan, out)
    tokenizer.save_pretrained(out)
    audit_folder(out, base_folder, base, names, wide=plan.wide)
    return MergeReport(
        adapted=0,
        merged=0,
        base=MergeBase.original.name,
        tied=plan.tied,
        untied=plan.untied,
        size=plan.size,
        seconds=round(time.perf_counter() - began, 2),
    )
