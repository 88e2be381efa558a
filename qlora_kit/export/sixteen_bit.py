"""A base as the folder that every format is made from: bf16 safetensors beside its tokenizer, nothing merged."""

import time
from pathlib import Path
from typing import Any

from qlora_kit.adapter.updates import Adapter
from qlora_kit.core.console.bar import BYTES, bar
from qlora_kit.export.merge import MergeReport, refuse_full_disk
from qlora_kit.export.merging.audit import audit_folder
from qlora_kit.export.merging.carry import carry_files, says_tied
from qlora_kit.export.merging.plan import make_plan
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.export.merging.write_shards import write_shards
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import read_headers


def write_sixteen_bit(base_folder: Path, tokenizer: Any, out: Path) -> MergeReport:
    """Copy a base tensor by tensor, every float rounded to bf16, and check the folder as a merge is checked.

    Args:
        base_folder: a model in 16 or 32 bit.
        out: an existing, empty folder.
    Returns:
        A report with no module adapted.
    Raises:
        RunError: a file of the base is damaged, there is no room, or the folder does not pass its audit.
    """
    from qlora_kit.model.device import this_device

    began = time.perf_counter()
    base = read_headers(base_folder)
    plan = make_plan(base, Adapter(base_folder, {}, {}), says_tied(base_folder), rounded=(), merge_rounded=False)
    refuse_full_disk(plan.size, out, "the copy of the base")
    with bar("copy", plan.size, BYTES) as one:
        write_shards(plan, Rounding(QuantConfig(kind=QuantKind.none), this_device()), out, one.advance)
    carry_files(base_folder, plan, out)
    tokenizer.save_pretrained(out)
    audit_folder(out, base_folder, base)
    return MergeReport(
        adapted=0,
        merged=0,
        base=MergeBase.original.name,
        tied=plan.tied,
        untied=plan.untied,
        size=plan.size,
        seconds=round(time.perf_counter() - began, 2),
    )
