"""Takes up a merge that was killed: a journal beside its files says which of them are complete."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from qlora_kit import __version__
from qlora_kit.adapter.saved import CONFIG, WEIGHTS
from qlora_kit.core.files import file_hash, read_json
from qlora_kit.export.merging.plan import BLOCK, Plan
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.export.merging.write_shards import Written, checksums
from qlora_kit.weights.headers import StoredTensor

JOURNAL = ".merge.json"


@dataclass(frozen=True)
class Journal:
    """The complete files of a merge in work.

    Attributes:
        inputs: hash of all that the files are made from.
        finished: the tensors of each complete file, by its name.
    """

    path: Path
    inputs: str
    finished: dict[str, list[Written]] = field(default_factory=dict)

    def record(self, name: str, tensors: list[Written]) -> None:
        """Note a file as complete.

        Nothing is forced to the disk: what a loss of power leaves of a file is found by its checksums.
        """
        self.finished[name] = tensors
        files = {file: [[t.name, t.changed, t.checksum] for t in found] for file, found in self.finished.items()}
        partial = self.path.with_name(f"{JOURNAL}.partial")
        partial.write_text(json.dumps({"inputs": self.inputs, "files": files}), encoding="utf-8")
        partial.replace(self.path)

    def close(self) -> None:
        """Remove it; the merge is complete, or not to be taken up."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{JOURNAL}.partial").unlink(missing_ok=True)


def take_up(out: Path, plan: Plan, inputs: str) -> Journal:
    """What an earlier merge of the same inputs has finished in a folder; weights that are not that are removed.

    Args:
        inputs: of `inputs_hash`.
    """
    journal = Journal(out / JOURNAL, inputs)
    for name, tensors in _noted(journal).items():
        found = checksums(out / name, plan.shards[name]) if name in plan.shards else None
        if found == {tensor.name: tensor.checksum for tensor in tensors}:
            journal.finished[name] = tensors
    for file in out.glob("*.safetensors"):
        if file.name not in journal.finished:
            file.unlink()
    if not journal.finished:
        journal.close()
    return journal


def inputs_hash(base: Iterable[StoredTensor], adapter: Path, plan: Plan, rounding: Rounding) -> str:
    """SHA-256 over what decides the merged bytes: base, adapter, rounding, versions, and the plan.

    The base's files count by path, size and time of change, the adapter's by their bytes.
    """
    import torch

    files = {tensor.file.resolve() for tensor in base}
    facts = {
        "base": sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "adapter": [file_hash(adapter / name) for name in (CONFIG, WEIGHTS)],
        "rounding": [repr(rounding.quant), rounding.device.type],
        "versions": [__version__, torch.__version__, platform.machine()],
        "plan": {
            name: [(piece.name, piece.dtype, piece.shape, piece.rounds, str(piece.source.file)) for piece in pieces]
            for name, pieces in plan.shards.items()
        },
        "block": BLOCK,
    }
    return sha256(json.dumps(facts).encode()).hexdigest()


def _noted(journal: Journal) -> dict[str, list[Written]]:
    """The complete files by a journal of the same inputs; none where it is another's, or cannot be read."""
    try:
        noted = read_json(journal.path)
        if noted["inputs"] != journal.inputs:
            return {}
        return {name: [Written(*tensor) for tensor in tensors] for name, tensors in noted["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
