"""Times training steps of qlora_kit and of its peers: one model, the same rows, each stack in a process of its own.

The models are random, of known shapes, in NF4 with double quantization; LoRA has r=16 on all linear layers, and every
step ends with clipping and AdamW. The batch is the same in every step, so the loss must fall. A step's time is the
median of six after three to warm up; tokens are counted without padding. A run that fails is a row with its error.

    python scripts/bench/train_step.py --quick --site /tmp/site --peers-site /tmp/peers
    python scripts/bench/train_step.py --only qlora_kit:fast:bf16:8b:4x2048 unsloth:no_recompute:bf16:8b:1x8192
    python scripts/bench/train_step.py --quick --profile          # where a step of qlora_kit spends its time
    python scripts/bench/train_step.py --quick --ahead    # import the next run's packages while one is measured
    python scripts/bench/train_step.py --only --longest 24 80     # the longest row that trains in so many 10^9 bytes
    python scripts/bench/train_step.py --cpu                      # a tiny shape, to try the script

Writes results/<device>/train_step-<date>.json after every run; rows of the same day are kept, and one measured again
keeps what it was under `before`.
"""

import argparse
import itertools
import json
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from train_step.parent import REPOSITORY, Begun, Machine
from train_step.runs import BATCHES, QUICK, Batch, Run, every_run

RESULTS = Path(__file__).parent / "results"
TINY = (Batch(2, 64), Batch(2, 128, packed=True))
LONGEST = ("qlora_kit:plain:bf16", "qlora_kit:fast:bf16", "unsloth:default:bf16")


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="RUN", help="stack:variant:compute:shape:batch; none: no such run")
    parser.add_argument("--quick", action="store_true", help="8b at 4x2048 for every stack")
    parser.add_argument("--shape", default="8b", choices=("1b", "8b", "70b"), help="unless --only names it")
    parser.add_argument(
        "--profile", nargs="*", metavar="RUN", help="one more step by kind of work, of these runs or all of qlora_kit"
    )
    parser.add_argument("--ahead", action="store_true", help="import the next run's packages while one is measured")
    parser.add_argument("--no-ceiling", action="store_true", help="do not measure what the device can do at best")
    parser.add_argument(
        "--longest", nargs="*", type=float, default=[], metavar="GB", help="for the shape, in 10^9 bytes"
    )
    parser.add_argument("--longest-of", nargs="*", default=LONGEST, metavar="STACK:VARIANT:COMPUTE")
    parser.add_argument("--longest-in-blocks", action="store_true", help="cheaper attention that needs the same memory")
    parser.add_argument("--longest-first", type=int, default=8192, metavar="TOKENS", help="that are tried first")
    parser.add_argument("--longest-growth", type=float, default=2, metavar="TIMES", help="from one to the next")
    parser.add_argument("--site", type=Path, help="packages of qlora_kit, unless this Python has them")
    parser.add_argument("--peers-site", type=Path, help="packages of the other stacks, likewise")
    parser.add_argument("--work", type=Path, help="for rows and logs; a new folder below /tmp unless given")
    parser.add_argument("--bases", type=Path, help="for models that are loaded; in --work unless given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=float, default=180, help="seconds for one run")
    parser.add_argument("--longest-limit", type=float, default=600, help="seconds for one search")
    parser.add_argument("--cpu", action="store_true", help="a tiny shape without a GPU")
    return parser.parse_args(line)


def chosen_runs(chosen: argparse.Namespace) -> list[Run]:
    """The runs that a command line asks for, in order."""
    if chosen.only is not None:
        return [Run.parse(name) for name in chosen.only]
    if chosen.cpu:
        return every_run("tiny", TINY)
    if chosen.quick:
        return every_run(chosen.shape, QUICK)
    return every_run(chosen.shape, BATCHES)


def profiled_runs(chosen: argparse.Namespace, runs: list[Run]) -> list[Run]:
    """Those of which a profile is wanted."""
    if chosen.profile is None:
        return []
    return [Run.parse(name) for name in chosen.profile] or [run for run in runs if run.is_ours]


class Results:
    """The file of results, rewritten after every run."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        device = str(about.get("device", "unknown"))
        name = re.sub(r"\W+", "_", device.lower()).strip("_")
        self.path = folder / name / f"train_step-{date.today().isoformat()}.json"
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.found: dict[str, Any] = {
            "device": device,
            "environment": about.get("environment", {}),
            "versions": before.get("versions", {}),
            "memory_counter": "resident memory of the process"
            if device == "cpu"
            else "torch.cuda.max_memory_allocated",
            "ceiling": about.get("ceiling", {}),
            "rows": before.get("rows", []),
            "longest": before.get("longest", []),
        }

    def add(self, part: str, identity: dict[str, object], run: Run, found: dict[str, Any]) -> None:
        """Put a row in the place of one with the same identity, and write the file."""
        self.found["versions"][run.stack] = found.pop("versions", self.found["versions"].get(run.stack, {}))
        same = [row for row in self.found[part] if all(row.get(name) == value for name, value in identity.items())]
        kept = [row for row in self.found[part] if row not in same]
        found["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        earlier = [{name: value for name, value in row.items() if name not in identity} for row in same]
        before = [one for row in earlier for one in (*row.pop("before", []), row)]
        self.found[part] = [*kept, {**identity, **found, **({"before": before} if before else {})}]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)


def rows_of(
    machine: Machine, runs: list[Run], profiled: list[Run], *, is_ahead: bool
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with its row; the next process has imported its packages by then if `is_ahead`."""
    bases = {(run.stack, run.shape): machine.base(run) for run in runs}
    able = deque(run for run in runs if "error" not in bases[run.stack, run.shape])
    begun = deque[Begun]()

    def begin(run: Run) -> Begun:
        base = bases[run.stack, run.shape]["base"]
        return machine.begin("train", str(run), run, base=base, profile=run in profiled)

    try:
        for run in runs:
            base = bases[run.stack, run.shape]
            if "error" in base:
                yield run, base
                continue
            while able and len(begun) < (2 if is_ahead else 1):
                begun.append(begin(able.popleft()))
            yield run, begun.popleft().result()
    finally:
        for waiting in begun:
            waiting.stop()


def search(machine: Machine, run: Run, gigabytes: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """The longest row for one stack and amount of memory."""
    base = machine.base(run)
    if "error" in base:
        return base
    name = f"longest-{gigabytes:g}-{run}"
    how = {"blocks": chosen.longest_in_blocks, "first": chosen.longest_first, "growth": chosen.longest_growth}
    return machine.job("longest", name, run, base=base["base"], gb=gigabytes, **how)


def row_line(run: Run, row: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{run.stack:10} {run.variant:13} {run.compute:13} {run.shape:5} {run.batch!s:14} "
    error = f"  {row['error'].splitlines()[-1][:110]}" if "error" in row else ""
    if "step_s" not in row:
        return name + error
    numbers = f"{row['tokens_per_s']:9.0f} {row['step_s']:8.3f} {row['peak_gb']:8.2f} {row['first_step_s']:8.1f}"
    return f"{name}{numbers} {row['losses'][0]:8.3f} {row['losses'][-1]:8.3f}{error}"


def main() -> None:
    """Measure, print, store."""
    chosen = arguments()
    runs = chosen_runs(chosen)
    work = (chosen.work or Path(tempfile.mkdtemp(prefix="train_step_"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    machine = Machine(work, chosen.bases or work, chosen.site, chosen.peers_site, chosen.cpu, chosen.limit)
    about = machine.job("about", "about", ceiling=not chosen.no_ceiling)
    if "error" in about:
        print(f"the device is unknown: {about['error']}", flush=True)
    results = Results(chosen.results, about)
    print(f"{results.found['device']}; logs in {work / 'logs'}; {results.found['ceiling']}")
    print(f"{'stack':10} {'variant':13} {'compute':13} {'shape':5} {'batch':14}  tokens/s   step s  peak GB  first s "
          "    loss       to", flush=True)  # fmt: skip
    for run, row in rows_of(machine, runs, profiled_runs(chosen, runs), is_ahead=chosen.ahead):
        results.add("rows", run.identity, run, row)
        print(row_line(run, row), flush=True)
        for name, value in row.get("profile", {}).items():
            print(f"    {name}: {value}", flush=True)
    searches(replace(machine, limit=chosen.longest_limit), results, chosen)
    print(results.path.relative_to(REPOSITORY) if results.path.is_relative_to(REPOSITORY) else results.path)


def searches(machine: Machine, results: Results, chosen: argparse.Namespace) -> None:
    """Find the longest rows, print, store."""
    for gigabytes, name in itertools.product(chosen.longest, chosen.longest_of):
        run = Run.parse(f"{name}:{chosen.shape}:1x{64 if chosen.cpu else 2048}")
        row = search(machine, run, gigabytes, chosen)
        identity = {part: run.identity[part] for part in ("stack", "variant", "compute", "shape")}
        identity |= {"gb": gigabytes, "attention": "in blocks" if chosen.longest_in_blocks else "whole"}
        results.add("longest", identity, run, row)
        final = "" if row.get("is_final") else f"at least; {row.get('error', '')[:110]}"
        print(f"longest {run.stack:10} {run.variant:13} {gigabytes:5g} GB {row.get('tokens', 0):8} {final}", flush=True)


if __name__ == "__main__":
    main()
