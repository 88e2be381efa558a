"""Checkpoints that are complete or do not count."""

import shutil
from pathlib import Path

from qlora_kit.core.files import write_text

COMPLETE = "complete"


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint whole; a killed process leaves the mark out."""
    write_text(checkpoint / COMPLETE, "")


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when it was written."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def last_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones beside it are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=step_of)
    for checkpoint in checkpoints:
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)
    return next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint.exists()), None)
