"""What becomes of one family: planned, trained three ways, exported as everything that it can be."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tiny_families.drive import Done, kit

EXPORTS = (
    "merged_16bit",
    "gguf_q8_0",
    "gguf_q4_k_m",
    "gptq_4bit_g64",
    "awq_4bit_g64",
    "w8a16",
    "bnb_nf4",
    "fp8_block",
    "adapter_peft",
    "adapter_gguf",
)
TRAININGS = {"train": ["engine=plain"], "fast": ["engine=fast"], "packed": ["data.batching=packed"]}
REFUSED = 2  # exit code of a line that is refused before a weight is loaded
_BARE = re.compile(r"^\w*(Error|Exception): ")  # of Python or a library, in front of what the kit did not foresee
_ENGINE = re.compile(r"^engine: fast|\bruns? plain\b")
_WISH = re.compile(r"the exports of this run name (\w+), which cannot be written: (.*)")


def row_of(base: Path, rows: Path, work: Path) -> dict[str, Any]:
    """The row of one checkpoint: what happened by verb and file, and what the fast engine said of itself.

    Args:
        base: folder of the checkpoint.
        rows: file of rows to train on.
        work: scratch folder for runs and logs.
    """
    common = [
        *(f"model.source={base}", "data=rows", f"data.train_file={rows}", "data.max_tokens=256", "data.eval_rows=2"),
        *("trainer.max_steps=2", "trainer.batch_size=2", "trainer.gradient_accumulation=1", "optim.learning_rate=2e-3"),
    ]
    plan = kit(["plan", *common, f"exports=[{','.join(EXPORTS)}]"], work / "plan.log")
    refused = {found[1]: found[2] for error in plan.errors if (found := _WISH.fullmatch(error))}
    wished = [option for option in EXPORTS if option not in refused]
    if refused:
        plan = kit(["plan", *common, f"exports=[{','.join(wished)}]"], work / "plan.log")
    row: dict[str, Any] = {"plan": _cell(plan)}
    for name, words in TRAININGS.items():
        own = [f"exports=[{','.join(wished)}]"] if name == "train" else []
        done = kit(["train", *common, *words, *own, f"name={name}"], work / f"{name}.log")
        row[name] = _cell(done)
        if name == "fast" and done.exit == 0:
            row["engine"] = [line for line in done.lines if _ENGINE.search(line)]
        if name != "train":
            shutil.rmtree(work / "outputs" / name, ignore_errors=True)
    exports: dict[str, Any] = {name: {"reason": why, "before_training": True} for name, why in refused.items()}
    if row["train"] == 0:
        exports |= _exported(work, wished)
    row["exports"] = {name: exports[name] for name in EXPORTS if name in exports}
    shutil.rmtree(work / "outputs", ignore_errors=True)
    return row


def _exported(work: Path, wished: list[str]) -> dict[str, Any]:
    """The cells of files that the run's recipe names."""
    (run,) = (work / "outputs" / "train").iterdir()
    done = kit(["export", f"run={run}", "export.calibration_rows=4"], work / "export.log")
    cells: dict[str, Any] = {}
    for name in wished:
        manifest = run / "exports" / name / "manifest.json"
        failed = [line for line in done.lines if line.startswith(f"{name}: failed: ")]
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            fidelity = found.get("fidelity") or {}
            cells[name] = {"mean_kl": fidelity.get("mean_kl"), "rejected": bool(found.get("rejected"))}
        elif failed:
            cells[name] = _told(failed[0].removeprefix(f"{name}: failed: "), work, before_training=False)
        else:
            cells[name] = {"fault": f"nothing was written: {_last(done)}"}
    return cells


def _cell(done: Done) -> int | dict[str, Any]:
    """0, or why not."""
    if done.exit == 0 and not done.has_traceback:
        return 0
    if done.exit == REFUSED and done.errors and not done.has_traceback:
        return {"exit": done.exit, "reason": "; ".join(done.errors), "before_training": True}
    if done.exit > 0 and done.errors and not done.has_traceback and not _BARE.match(done.errors[0]):
        return {"exit": done.exit, "reason": "; ".join(done.errors), "before_training": False}
    return {"exit": done.exit, "fault": _last(done)}


def _told(reason: str, work: Path, *, before_training: bool) -> dict[str, Any]:
    if _BARE.match(reason):
        return {"fault": reason.replace(str(work), "<folder>")}
    return {"reason": reason.replace(str(work), "<folder>"), "before_training": before_training}


def _last(done: Done) -> str:
    """The last line that was printed, or the first error."""
    return next(iter(done.errors), next((line for line in reversed(done.lines) if line.strip()), "nothing was said"))


def faults(row: dict[str, Any]) -> dict[str, str]:
    """What is neither done nor refused with a reason, by cell."""
    cells = {name: row[name] for name in ("plan", *TRAININGS)} | row["exports"]
    return {name: cell["fault"] for name, cell in cells.items() if isinstance(cell, dict) and "fault" in cell}
