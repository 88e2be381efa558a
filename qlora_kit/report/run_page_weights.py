"""What became of the learned update in each file: the merge base that was taken, and what rounding left of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.core.units import kept_share
from qlora_kit.report.run_page_facts import Artifact, Survival
from qlora_kit.report.run_page_fidelity import NONE, Badge, Cell, FileTable, Line, decimals


@dataclass(frozen=True)
class KeptUpdate:
    """The share of the update that each file keeps.

    Attributes:
        warnings: a file, and what was said of it.
        advice: files in words, and the lines that their warnings end with, which mostly are the same.
        not_measured: names of the other files, in words.
    """

    table: FileTable
    warnings: Sequence[tuple[str, str]]
    advice: Sequence[tuple[str, str]]
    not_measured: str


def merge_bases(exports: Sequence[Artifact]) -> FileTable | None:
    """The held-out loss of each file by the base that it was made from; None where no bases were compared."""
    compared = [one for one in exports if one.merge_bases]
    if not compared:
        return None
    bases = list(dict.fromkeys(base for one in compared for base in one.merge_bases))
    lines = [Line(one.name, [_loss_cell(one, base) for base in bases]) for one in compared]
    return FileTable("file", [Cell(base, "loss, nats") for base in bases], lines)


def _loss_cell(one: Artifact, base: str) -> Cell:
    loss = one.merge_bases.get(base)
    said = NONE if loss is None else decimals(4)(loss)
    return Cell(said, "taken", is_chosen=True) if base == one.merge_base else Cell(said)


def survival(exports: Sequence[Artifact]) -> KeptUpdate | None:
    """The share of the update that each file keeps, by kind of layer; None where no file was read back."""
    measured = [(one.name, one.survival) for one in exports if one.survival is not None]
    if not measured:
        return None
    kinds = list(dict.fromkeys(kind for _, found in measured for kind in found.kinds))
    lines = [Line(name, _cells(found, kinds), _badge(found)) for name, found in measured]
    warnings, advice = _warnings(measured)
    return KeptUpdate(
        FileTable("file", [Cell(kind, "least") for kind in ("all layers", *kinds)], lines),
        warnings,
        advice,
        ", ".join(one.name for one in exports if one.survival is None),
    )


def _cells(found: Survival, kinds: Sequence[str]) -> list[Cell]:
    of_kinds = [_kept(*found.kinds.get(kind, (None, None))) for kind in kinds]
    return [_kept(found.kept, found.worst_kept), *of_kinds]


def _badge(found: Survival) -> Badge:
    if found.warning is None:
        return Badge("unknown", "not judged")
    return Badge("warned", "partly lost") if found.warning else Badge("kept", "kept")


def _kept(all_of_it: float | None, least: float | None) -> Cell:
    """A share, and below it that of the weight that kept the least."""
    if all_of_it is None:
        return Cell(NONE)
    return Cell(kept_share(all_of_it), NONE if least is None else kept_share(least))


def _warnings(measured: Sequence[tuple[str, Survival]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What was said of each file, and each advice once."""
    said, advice = [], dict[str, list[str]]()
    for name, found in measured:
        first, *lines = (found.warning or "").splitlines() or [""]
        if first:
            said.append((name, first))
        if lines:
            advice.setdefault("\n".join(line.strip() for line in lines), []).append(name)
    return said, [(", ".join(names), lines) for lines, names in advice.items()]
