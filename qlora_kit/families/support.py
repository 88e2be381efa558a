"""What became of each family that was tried, as the newest run of `scripts/bench/families.py` left it."""

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, typed_path
from qlora_kit.core.shell import override, shell_line

RECORD = Path(__file__).parent / "support.json"
TRAININGS = ("train", "fast", "packed")
# The columns of the terminal's table, each of one or several cells, all of which must be there.
_COLUMNS = {
    "train": ("train",),
    "fast": ("fast",),
    "pack": ("packed",),
    "16bit": ("merged_16bit",),
    "gguf": ("gguf_q8_0", "gguf_q4_k_m"),
    "gptq": ("gptq_4bit_g64",),
    "awq": ("awq_4bit_g64",),
    "w8a16": ("w8a16",),
    "bnb": ("bnb_nf4",),
    "fp8": ("fp8_block",),
    "peft": ("adapter_peft",),
    "lora": ("adapter_gguf",),
}
_WIDTH = 80  # columns of a terminal as it opens
_LEGEND = """
tiny checkpoints with random weights, through the command line
pack: packed rows; fp8: FP8 blocks; peft, lora: the adapter (for llama.cpp)
part: fast in part; plain: trains, no layer is fast; no: refused; -: not tried
rej.: written and scored, and rejected for what was found
every cell with its reason: qlora-kit recipes families NAME
other families: qlora-kit plan says what a base cannot become
"""
YES, PARTLY, PLAIN, REJECTED, NO, FAULT, UNTRIED = "yes", "part", "plain", "rej.", "no", "FAULT", "-"


@dataclass(frozen=True)
class Cell:
    """What became of one way.

    Attributes:
        word: yes, part (fast in part), plain (no fast layer), rej. (a rejected file), no, FAULT, or - where it was not
            tried.
        mean_kl: of a file that was scored.
        reason: why not, or what runs plain.
        before_training: whether it is refused before a weight is loaded.
    """

    word: str
    mean_kl: float | None = None
    reason: str = ""
    before_training: bool = True

    def __str__(self) -> str:
        words = {PARTLY: "yes, in part", PLAIN: "yes, plain", UNTRIED: "not tried", FAULT: "fails"}
        words |= {REJECTED: "rejected"}
        said = words.get(self.word, self.word)
        if self.word == NO:
            said = "refused before training" if self.before_training else "refused after training"
        kl = "" if self.mean_kl is None else f", mean KL {kl_text(self.mean_kl)}"
        return f"{said}{kl}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class FamilySupport:
    """The row of a family: its cells by training and by option of the group `export`."""

    name: str
    architecture: str
    model_type: str
    cells: Mapping[str, Cell]


def kl_text(value: float) -> str:
    """A mean KL as a table has it."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def packaged_record() -> dict[str, Any]:
    """The record that came with the package."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


@cache
def supported() -> tuple[FamilySupport, ...]:
    """The rows of every family that was tried, sorted by name."""
    return tuple(rows_of(packaged_record()))


def rows_of(record: Mapping[str, Any]) -> Iterator[FamilySupport]:
    """The rows of a record."""
    for name, row in sorted(record["families"].items()):
        cells = {one: _of_training(row.get(one), row.get("engine", []) if one == "fast" else []) for one in TRAININGS}
        tried = {option: _of_export(cell) for option, cell in row["exports"].items()}
        cells |= {option: tried.get(option, Cell(UNTRIED)) for option in options_of(record)}
        yield FamilySupport(name, row["architecture"], row["model_type"], cells)


def options_of(record: Mapping[str, Any]) -> list[str]:
    """The exports that were tried, in their order."""
    return list(dict.fromkeys(option for row in record["families"].values() for option in row["exports"]))


def meant_families(word: str) -> list[FamilySupport]:
    """The rows that a name, a model_type, an architecture, or the folder of a model stands for.

    Raises:
        RecipeError: none; with the nearest names.
    """
    folder = typed_path(word)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        words = [*(config.get("architectures") or []), config.get("model_type")]
        if found := next((rows for one in words if (rows := _named(str(one)))), []):
            return found
        what = (
            f"{word} is a model of type '{config.get('model_type')}', which is not among the families that were tried"
        )
        line = ["qlora-kit", "plan", override("model.source", word), "data=rows", "data.max_tokens=auto"]
        raise RecipeError(what, fix=shell_line(line))
    if found := _named(word):
        return found
    near = _near(word)
    what = f"there is no family '{word}'" + (f"; did you mean {', '.join(near)}?" if near else "")
    raise RecipeError(what, fix=shell_line(["qlora-kit", "recipes", "families", *near[:1]]))


def _near(word: str) -> list[str]:
    """Families that a word may mean, the likeliest first.

    The name of a model begins with its family's, then come numbers (gemma-3-4b-it). That of a mixture says how many of
    its weights are active (30B-A3B).
    """
    names = sorted({row.name for row in supported()}, key=lambda name: (-len(_bare(name)), name))
    model = _bare(word.rsplit("/", 1)[-1])
    begins = [name for name in names if re.match(rf"{_bare(name)}\d", model)]
    if re.search(r"[-_]a\d+(\.\d+)?b(?![a-z])", word.lower()):
        begins = [more for name in begins if (more := f"{name}_moe") in names] + begins
    others = sorted({one for row in supported() for one in (row.name, row.model_type, row.architecture)})
    return (begins or difflib.get_close_matches(word, others, n=3, cutoff=0.5))[:3]


def _bare(name: str) -> str:
    """A family's or a model's name in letters and digits; one with a tower beside its language model has that one's."""
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("vl_"))


def _named(word: str) -> list[FamilySupport]:
    rows = supported()
    by_name = [row for row in rows if row.name == word]
    return by_name or [row for row in rows if word in (row.architecture, row.model_type)]


def _of_training(cell: Any, engine: list[str]) -> Cell:
    if cell == 0:
        plain = [line for line in engine if not line.startswith("engine: ")]
        if len(plain) < len(engine) or not engine:
            return Cell(PARTLY if plain else YES, reason="; ".join(plain))
        return Cell(PLAIN, reason="; ".join(plain))
    return _refused(cell)


def _of_export(cell: Mapping[str, Any]) -> Cell:
    if "mean_kl" in cell:
        return Cell(REJECTED if cell["rejected"] else YES, mean_kl=cell["mean_kl"])
    return _refused(cell)


def _refused(cell: Any) -> Cell:
    if not isinstance(cell, Mapping):
        return Cell(UNTRIED)
    if "fault" in cell:
        return Cell(FAULT, reason=cell["fault"])
    return Cell(NO, reason=cell["reason"], before_training=cell["before_training"])


def lines_of_table(rows: Sequence[FamilySupport], note: str = "") -> Iterator[str]:
    """A line for each family, at most 80 columns wide.

    Args:
        note: what is to be known of the record.
    """
    width = max(len(row.name) for row in rows)
    yield " ".join([f"{'family':<{width}}", *_COLUMNS])
    for row in rows:
        words = (_worst([row.cells.get(one, Cell(UNTRIED)) for one in cells]) for cells in _COLUMNS.values())
        told = (f"{word:<{len(head)}}" for head, word in zip(_COLUMNS, words, strict=True))
        yield " ".join([f"{row.name:<{width}}", *told]).rstrip()
    yield from _LEGEND.rstrip().splitlines()
    yield from textwrap.wrap(note, _WIDTH)


def lines_of_family(row: FamilySupport) -> Iterator[str]:
    """Every cell of a family, with its number or its reason."""
    yield f"{row.name}: {row.architecture}, model_type {row.model_type}, tiny and with random weights"
    width = max(map(len, row.cells))
    yield from (f"  {name:<{width}}  {cell}" for name, cell in row.cells.items())


def _worst(cells: Sequence[Cell]) -> str:
    order = (FAULT, NO, REJECTED, UNTRIED, PLAIN, PARTLY, YES)
    return min((cell.word for cell in cells), key=order.index)
