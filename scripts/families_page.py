"""Writes docs/families.md and qlora_kit/families/support.json from the newest record of scripts/bench/families.py."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.families.support import (
    NO,
    PARTLY,
    PLAIN,
    RECORD,
    REJECTED,
    TRAININGS,
    Cell,
    kl_text,
    options_of,
    rows_of,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
RESULTS = ROOT / "scripts" / "bench" / "results"
HEAD = """# Families

A tiny checkpoint of each family, with random weights and few layers, went through the command line: `qlora-kit plan`,
two steps of training with `engine=plain`, `engine=fast` and `data.batching=packed`, and an export of every format. The
same table in the terminal, and each reason in full: `qlora-kit recipes families` and
`qlora-kit recipes families llama`. Other families take the same ways: `plan` and `train` say what a base cannot become
before a weight is loaded.

**yes** with a number was read back and scored; the number is the mean KL in nats against the trained model.
**Of tiny random models, the numbers of 4-bit files say nothing of real ones**: none of their weights was trained to be
redundant, and which experts a random router chooses flips by a hair. They show that a file is whole, and is read by
what will serve it. A number in brackets leads to the reason below the table; each was told before a weight was loaded,
unless it says otherwise. *part*: the fast engine computes a part of the layers, and the rest is plain. *plain*: it
trains, and no layer is fast. *rejected*: a file that was scored, and marked so for what was found.
"""


def newest_record() -> Path:
    """The newest record that there is."""
    found = sorted(RESULTS.glob("*/families-*.json"), key=lambda path: path.name)
    return found[-1]


def packaged(record: Mapping[str, Any]) -> str:
    """The part of a record that comes with the package, a family in a line."""
    about = {key: record[key] for key in ("commit", "versions", "note") if key in record}
    kept = ("architecture", "model_type", *TRAININGS, "engine", "exports")
    lines = (
        f"  {json.dumps(name)}: {json.dumps({key: row[key] for key in kept if key in row})}"
        for name, row in sorted(record["families"].items())
    )
    return json.dumps(about)[:-1] + ', "families": {\n' + ",\n".join(lines) + "\n}}\n"


def page(record: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    reasons: dict[str, int] = {}
    columns = [*TRAININGS, *options_of(record)]
    lines = ["| family | " + " | ".join(f"`{name}`" for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows_of(record):
        cells = (_shown(row.cells[name], reasons) for name in columns)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    table = "\n".join(lines)
    told = "\n".join(_told(reasons))
    note = f"Of this record: {record['note']}.\n\n" if record.get("note") else ""
    return f"{HEAD}\n{note}{table}\n\n## Reasons\n\n{told}\n\nMeasured at {record['commit']} with {versions}.\n"


def _shown(cell: Cell, reasons: dict[str, int]) -> str:
    said = {PARTLY: "*part*", PLAIN: "*plain*", REJECTED: "*rejected*"}.get(cell.word, cell.word)
    if cell.mean_kl is not None:
        return f"{said} {kl_text(cell.mean_kl)}"
    if not cell.reason:
        return said
    told = f"{cell.reason}{'' if cell.before_training or cell.word != NO else ' (told after training)'}"
    return f"{said} ({reasons.setdefault(told, len(reasons) + 1)})"


def _told(reasons: Mapping[str, int]) -> Iterator[str]:
    for reason, number in reasons.items():
        yield f"{number}. {reason.replace('|', '/').replace('<', '&lt;')}"


def main() -> None:
    record = json.loads(newest_record().read_text(encoding="utf-8"))
    RECORD.write_text(packaged(record), encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
