"""Takes a tiny random checkpoint of each family through the command line: plan, three trainings, every export.

    python scripts/bench/families.py --work /tmp/families --jobs 2
    python scripts/bench/families.py --work /tmp/families --families qwen3_moe,vl_gemma3

Writes results/<device>/families-<date>.json where all families were run, and scripts/families_page.py makes the page of
it. One that is finished in the work folder is not run again. Exit code 1 where a cell is neither done nor refused with
a reason.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the checkpoints of the tests

from tiny_families.drive import forked, preload, write_rows  # noqa: E402
from tiny_families.row import faults, row_of  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "llmcompressor", "auto-round", "xllamacpp")
WHAT = (
    "plan, train (plain, fast, packed) and exports of a tiny random checkpoint of each family, through the command "
    "line; groups of 64, two steps, two held-out rows"
)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}


def run(name: str, work: Path) -> int:
    """Build one checkpoint and write its row."""
    from tiny_families.checkpoints import build

    base = work / "models" / name
    architecture = build(name, base)
    kind = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    row = {"architecture": architecture, "model_type": kind, **row_of(base, work / "rows.jsonl", work / "runs" / name)}
    write(work / "rows" / f"{name}.json", row)
    return 0


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    beside.rename(path)


def run_all(names: list[str], work: Path, jobs: int) -> None:
    """Run families that are not finished, some at once; each in a process of its own."""
    left = [name for name in names if not (work / "rows" / f"{name}.json").is_file()]
    running: dict[int, str] = {}
    while left or running:
        while left and len(running) < jobs:
            name = left.pop(0)
            child = os.fork()
            if child == 0:
                done = forked(lambda name=name: run(name, work), work / "runs" / name / "driver.log")  # type: ignore[misc]  # mypy cannot infer the default argument
                os._exit(0 if done.exit == 0 else 1)
            running[child] = name
        child, _ = os.wait()
        name = running.pop(child)
        told(name, work)


def told(name: str, work: Path) -> None:
    """Print what became of a family in one line."""
    file = work / "rows" / f"{name}.json"
    if not file.is_file():
        print(f"{name}: FAULT: see {work / 'runs' / name / 'driver.log'}", flush=True)
        return
    row = json.loads(file.read_text(encoding="utf-8"))
    exports = row["exports"].items()
    kls = " ".join(f"{key}={cell['mean_kl']:.4f}" for key, cell in exports if cell.get("mean_kl") is not None)
    refused = [key for key, cell in {**row, **row["exports"]}.items() if isinstance(cell, dict) and "reason" in cell]
    wrong = "; ".join(f"FAULT in {key}: {what[:200]}" for key, what in faults(row).items())
    print(f"{name}: {kls}; refused: {', '.join(refused) or 'nothing'} {wrong}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; finished families in it are kept")
    parser.add_argument("--families", help="names with commas between them; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="families at once")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    os.environ |= {**SETTINGS, "QLORA_KIT_CACHE": str(work / "cache")}
    preload()
    from tiny_families.checkpoints import CONFIGS

    names = chosen.families.split(",") if chosen.families else list(CONFIGS)
    if unknown := [name for name in names if name not in CONFIGS]:
        parser.error(f"no family is called {', '.join(unknown)}; there are {', '.join(CONFIGS)}")
    work.mkdir(parents=True, exist_ok=True)
    write_rows(work / "rows.jsonl")
    run_all(names, work, chosen.jobs)
    finished = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (work / "rows").glob("*.json")}
    rows = {name: finished[name] for name in CONFIGS if name in finished}
    missing = [name for name in names if name not in rows]
    wrong = {name: found for name, row in rows.items() if (found := faults(row))}
    if not chosen.families:
        store(rows, chosen.results)
    for name, found in wrong.items():
        print(f"FAULT: {name}: {found}", file=sys.stderr)
    return 1 if wrong or missing else 0


def store(rows: dict[str, Any], results: Path) -> None:
    """Write the record of a whole run."""
    from prepare import device_name, folder_of

    device = device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {
        "device": device,
        "commit": commit.stdout.strip(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "what": WHAT,
        "families": dict(sorted(rows.items())),
    }
    place = results / folder_of(device) / f"families-{date.today()}.json"
    write(place, found)
    print(f"written to {place}")


if __name__ == "__main__":
    sys.exit(main())
