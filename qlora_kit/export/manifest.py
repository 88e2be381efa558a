"""manifest.json of an artifact: what it is, from what, with which versions, and how faithful."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.environment import package_versions
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.export.merge import MergeReport
from qlora_kit.runs.directory import MANIFEST

# What else is read of a manifest, which may be damaged or a stranger's.
KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("settings", "fidelity", "evaluation", "left_in_16_bit", "uncalibrated"), dict),
    "faults": list,
    "max_mean_kl": (int, float),
}


@dataclass(frozen=True)
class Manifest:
    """The record beside an exported artifact.

    Attributes:
        bits: what a budget of bits was spent on, layer by layer; empty without one.
        left_in_16_bit: layers that the format could not take, and why; empty where it took all.
        uncalibrated: what calibration rows told nothing of; empty where they told of all, or none were looked at.
        faults: why it is rejected, in words.
        scored_on: the rows that `fidelity` is of, by `evaluation.scored_on`; empty where there were none.
        verdict: accepted, rejected, measured or not measured, see `core.verdict`.
        reader: what scored it.
        contract: whether its readers give the token ids that training saw.
        servers: what each server was found to make of it, and whether it was run for that.
        survival: how much of what was learned is left in the weights; empty where they are not read back.
        serve: the commands to serve it.
    """

    name: str
    format: str
    file: str
    settings: Mapping[str, object]
    merge: MergeReport
    run: str
    seconds: float
    fidelity: Mapping[str, float]
    max_mean_kl: float | None
    verdict: str
    rejected: bool
    bits: Mapping[str, object] = field(default_factory=dict)
    left_in_16_bit: Mapping[str, object] = field(default_factory=dict)
    uncalibrated: Mapping[str, object] = field(default_factory=dict)
    faults: Sequence[str] = ()
    reader: str = ""
    contract: Mapping[str, object] = field(default_factory=dict)
    servers: Sequence[Mapping[str, object]] = ()
    survival: Mapping[str, object] = field(default_factory=dict)
    serve: Sequence[Mapping[str, object]] = ()
    scored_on: Mapping[str, object] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write manifest.json into the artifact's folder."""
        write_json(folder / MANIFEST, {**asdict(self), "versions": package_versions()})


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The record of an artifact's folder, without what is not of the kind that it should be.

    Raises:
        RecipeError: it cannot be read, does not say what the artifact is, or names a file outside the folder.
    """
    path = folder / MANIFEST
    found = dict(read_json(path))
    if not isinstance(found.get("format"), str) or not isinstance(found.get("file"), str):
        raise RecipeError(f"{path} is damaged: it does not say which file there is, or of which format", str(path))
    if Path(found["file"]).is_absolute() or ".." in Path(found["file"]).parts:
        raise RecipeError(f"{path} names a file outside its folder, {found['file']}", str(path))
    for key, kind in KINDS.items():
        if not isinstance(found.get(key), kind):
            found.pop(key, None)
    return found


def record_scores(folder: Path, scores: Mapping[str, Any], scored_on: Mapping[str, object]) -> None:
    """Add what `eval` measured to an artifact's manifest; not through a link, which may lead to another's folder."""
    if folder.is_symlink():
        log.info(f"{folder} is a link, so its manifest stays as it was; the scores are in eval.json")
        return
    manifest = read_manifest(folder)
    faults = list(dict.fromkeys([*faults_of_export(manifest), *scores["faults"]]))
    judged = {"verdict": scores["verdict"], "rejected": scores["rejected"], "faults": faults}
    write_json(folder / MANIFEST, {**manifest, **judged, "evaluation": dict(scores), "evaluated_on": dict(scored_on)})


def faults_of_export(manifest: Mapping[str, Any]) -> list[str]:
    """What was wrong with a file when it was written: its faults without those that `eval` added."""
    added: Sequence[str] = (manifest.get("evaluation") or {}).get("faults") or ()
    return [fault for fault in manifest.get("faults") or () if fault not in added]


def record_bases(folder: Path, losses: Mapping[str, float]) -> None:
    """Add the held-out loss of the file that each merge base gave; the one in the folder has the lowest."""
    write_json(folder / MANIFEST, {**read_manifest(folder), "merge_bases": dict(losses)})
