"""What a user gets on a GPU from a line that he types, ours and a peer's: checkpoints and rows that lie on disk.

Random checkpoints of published shapes are written to a folder first, as a hub would give them. A card of a smaller size
is made by holding the rest of its memory in another process. Every run is a child process with default settings or a
recipe's own; its line of the table has the seconds to the first and last step, the memory that was planned and that was
needed, tokens/s of real tokens, or the error. Losses are in the file:

    python scripts/bench/user_line.py --tokenizer FOLDER --work /tmp/user_line --peers /tmp/peers
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chat_rows import write_full, write_mixed
from random_base import shapes, write_base

BENCH = Path(__file__).resolve().parent
REPOSITORY = BENCH.parents[1]
HOLD = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - float(sys.argv[1]) * 1e9), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("held", flush=True)
time.sleep(1e5)
"""
MIXED = ("data=rows", "data.max_tokens=2048", "trainer.batch_size=4", "trainer.max_steps=30")
FULL = ("data=rows", "data.max_tokens=2048", "trainer.batch_size=4", "trainer.max_steps=20")
RANK_8 = ("lora.r=8", "lora.alpha=16")
WATCH_SECONDS = 0.1
WARM = 5  # steps that are not counted in a rate, as in `user_line_unsloth.py`


@dataclass(frozen=True)
class Case:
    """One line that a user types.

    Attributes:
        model: of the published shapes.
        words: behind `qlora-kit train`; for a peer behind its script.
        free: GB that the card has; 0 for all of it.
        rows: which file of rows.
        peer: whose line it is; "" for ours.
    """

    name: str
    model: str
    words: tuple[str, ...]
    free: float = 0.0
    rows: str = "mixed"
    peer: str = ""


def _shipped(experiment: str, model: str, free: float, *more: str) -> Case:
    name = "-".join((experiment, *(word.replace("=", "_") for word in more)))
    return Case(name, model, (f"experiment={experiment}", "model.revision=null", "trainer.max_steps=10", *more), free)


def _unsloth(name: str, model: str, rows: str, *words: str, steps: int = 20) -> Case:
    return Case(name, model, ("--steps", str(steps), "--batch", "4", *words), rows=rows, peer="unsloth")


def _beside_unsloth(model: str) -> Iterator[Case]:
    """Ours with the whole card, all recomputed, with little more than the peer needs; the peer: 50 steps of chat."""
    for name, rows, peer in (
        ("mixed", ("data=rows", "trainer.batch_size=4"), ("--batch", "4")),
        ("mixed_1", ("data=rows", "trainer.batch_size=1"), ("--batch", "1")),
        ("packed", ("data=packed", "trainer.batch_size=4"), ("--batch", "4", "--packed")),
    ):
        words = (*rows, "data.max_tokens=2048", "trainer.max_steps=50", "engine=fast")
        yield Case(f"{model}-{name}-fast", model, words)
        yield Case(f"{model}-{name}-recomputed", model, (*words, "engine.recompute=all"))
        yield Case(f"{model}-{name}-10gb", model, words, 10.0)
        yield Case(f"{model}-{name}-unsloth", model, ("--steps", "50", *peer), rows="mixed", peer="unsloth")


CASES = (
    _shipped("llama3_1_8b_chat_16gb", "llama_8b", 15.5),
    _shipped("llama3_1_8b_chat_16gb", "llama_8b", 15.5, "engine=fast"),
    _shipped("llama3_1_8b_chat_24gb", "llama_8b", 23.5),
    _shipped("llama3_1_8b_chat_24gb", "llama_8b", 23.5, "engine=fast"),
    _shipped("llama3_2_1b_chat_8gb", "llama_1b", 7.6),
    _shipped("llama3_2_1b_chat_8gb", "llama_1b", 7.6, "engine=fast"),
    _shipped("gemma3_4b_chat_12gb", "gemma_4b", 11.6),
    _shipped("qwen3_8b_chat_24gb", "qwen_8b", 23.5),
    _shipped("qwen3_8b_chat_24gb", "qwen_8b", 23.5, "engine=fast"),
    Case("mixed", "llama_8b", MIXED),
    Case("packed", "llama_8b", ("data=packed", *MIXED[1:])),
    *(case for model in ("llama_8b", "qwen_8b", "gemma_4b", "llama_1b") for case in _beside_unsloth(model)),
    Case("30b_a3b_4x2048-24gb-r8", "30b_a3b", (*FULL, "engine=fast", *RANK_8), 24.7, "full"),
    _unsloth("30b_a3b_4x2048-r8-unsloth", "30b_a3b", "full", "--rank", "8", steps=12),
    Case("30b_a3b_4x2048-whole", "30b_a3b", (*FULL, "engine=fast"), rows="full"),
    _unsloth("30b_a3b_4x2048-unsloth", "30b_a3b", "full", steps=12),
    Case("30b_a3b_mixed-24gb-r8", "30b_a3b", (*MIXED, "trainer.batch_size=2", "engine=fast", *RANK_8), 23.5),
    Case("30b_a3b_packed-24gb-r8", "30b_a3b", ("data=packed", *MIXED[1:], "engine=fast", *RANK_8), 24.7),
    Case("30b_a3b_12_layers-fast", "30b_a3b_12_layers", (*FULL, "engine=fast"), rows="full"),
    Case("30b_a3b_12_layers-fast-12gb", "30b_a3b_12_layers", (*FULL, "engine=fast"), 11.9, "full"),
    Case("30b_a3b_12_layers-plain", "30b_a3b_12_layers", FULL, rows="full"),
    Case("gpt_oss_20b_4x2048", "gpt_oss_20b", (*FULL, "engine=fast"), rows="full"),
    Case("qwen3_5_4b_4x2048", "qwen3_5_4b", FULL, rows="full"),
    Case("qwen3_5_4b_4x2048-fast", "qwen3_5_4b", (*FULL, "engine=fast"), rows="full"),
)


@dataclass
class Line:
    """What came of a case; sizes in bytes.

    Attributes:
        first_step_seconds: from the command to the first step that is written down, like `last_step_seconds`.
        tokens_per_second: of all steps behind the first `WARM`, whatever was captured or compiled in them.
        losses: by step.
    """

    case: str
    who: str
    words: list[str]
    free_gb: float
    exit_code: int
    seconds: float
    error: str = ""
    first_step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, rows and runs")
    parser.add_argument("--peers", type=Path, help="folder of the peers' packages; without, theirs are left out")
    parser.add_argument("--results", type=Path, default=Path("scripts/bench/results"))
    parser.add_argument("--only", nargs="*", help="names of cases, or parts of names")
    parser.add_argument("--seconds", type=float, default=540, help="begin no further case after so many seconds")
    parser.add_argument("--limit", type=float, default=200, help="seconds of one case")
    asked = parser.parse_args()
    began = time.monotonic()
    cases = [case for case in CASES if not asked.only or any(part in case.name for part in asked.only)]
    if not asked.peers:
        cases = [case for case in cases if not case.peer]
    asked.work.mkdir(parents=True, exist_ok=True)
    known = shapes()
    for model in dict.fromkeys(case.model for case in cases):
        write_base(known[model], asked.tokenizer, asked.work / model, jobs=max(1, (os.cpu_count() or 1) // 4))
        print(f"{model}: written after {time.monotonic() - began:.0f} s", flush=True)
    write_mixed(asked.tokenizer, asked.work / "mixed.jsonl")
    write_full(asked.tokenizer, asked.work / "full.jsonl", 2048)
    lines: list[Line] = []
    for case in cases:
        if time.monotonic() - began > asked.seconds:
            print(f"{case.name}: not begun, the time is up", flush=True)
            continue
        with card_of(case.free):
            run_case = run_peer if case.peer else run
            lines.append(run_case(case, asked.work, asked.limit, asked.peers))
        print(shown(lines[-1]), flush=True)
        write(lines, asked.results)


def run(case: Case, work: Path, limit: float, _: Path | None) -> Line:
    """One case of ours in a child process."""
    folder = _empty_folder(case, work)
    words = ["train", *case.words, f"model.source={work / case.model}", f"data.train_file={rows_of(case, work)}"]
    line, met = _timed(case, [sys.executable, "-m", "qlora_kit", *words], folder, limit, [REPOSITORY], work)
    if met:
        line.first_step_seconds, line.last_step_seconds = met[0], met[-1]
    for result in folder.glob("outputs/*/*/result.json"):
        line.result = json.loads(result.read_text(encoding="utf-8"))
    for metrics in folder.glob("outputs/*/*/metrics.jsonl"):
        logged = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
        steps = [one for one in logged if "loss" in one]
        line.losses = {str(one["step"]): one["loss"] for one in steps}
        line.tokens_per_second = rate(steps)
    return line


def rate(steps: Sequence[Mapping[str, float]]) -> float:
    """Tokens of the steps behind the first ones, by their seconds; 0 where there are none."""
    if len(steps) <= WARM:
        return 0.0
    before, last = steps[WARM - 1], steps[-1]
    return round((last["tokens"] - before["tokens"]) / (last["seconds"] - before["seconds"]), 1)


def run_peer(case: Case, work: Path, limit: float, peers: Path | None) -> Line:
    """One case of a peer's, by its own loader and trainer."""
    assert peers is not None  # cases of peers are left out without
    folder = _empty_folder(case, work)
    out = folder / "result.json"
    words = ["--base", str(work / case.model), "--rows", str(rows_of(case, work)), "--out", str(out), *case.words]
    command = [sys.executable, str(BENCH / f"user_line_{case.peer}.py"), *words]
    line, _ = _timed(case, command, folder, limit, [peers], work)
    if out.exists():
        line.result = json.loads(out.read_text(encoding="utf-8"))
        line.losses = {str(step): loss for step, loss in enumerate(line.result.pop("losses"), start=1)}
        line.first_step_seconds, line.last_step_seconds = (
            line.result.pop(f"{which}_step_seconds") for which in ("first", "last")
        )
        line.tokens_per_second = line.result.pop("tokens_per_second")
    return line


def _empty_folder(case: Case, work: Path) -> Path:
    """Of its run; what an earlier one left there would be taken for its result."""
    folder = work / "runs" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def rows_of(case: Case, work: Path) -> Path:
    """The file of its rows."""
    return work / f"{case.rows}.jsonl"


def _timed(
    case: Case, command: Sequence[str], folder: Path, limit: float, packages: Sequence[Path], work: Path
) -> tuple[Line, list[float]]:
    """Run a command; the seconds at which further lines of a run's metrics were seen."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, packages), os.environ.get("PYTHONPATH", "")]),
        "QLORA_KIT_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    began, seen, met = time.monotonic(), 0, list[float]()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(WATCH_SECONDS)
            count = sum(file.read_bytes().count(b"\n") for file in folder.glob("outputs/*/*/metrics.jsonl"))
            if count > seen:
                seen, met = count, [*met, round(time.monotonic() - began, 1)]
        if process.poll() is None:
            process.kill()
        code = process.wait()
    line = Line(case.name, case.peer or "qlora_kit", list(case.words), case.free, code, 0.0)
    line.seconds = round(time.monotonic() - began, 1)
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    errors = [part for part in text.splitlines() if "error" in part.lower()[:40] or "OutOfMemory" in part]
    line.error = errors[-1][:300] if errors and code else ""
    return line, met


def shown(line: Line) -> str:
    """A line of the table."""
    planned, peak = (line.result.get(name, 0.0) / 1e9 for name in ("planned_memory_bytes", "peak_memory_bytes"))
    off = f"{planned / peak - 1:+.0%}" if planned and peak else ""
    return (
        f"{line.case:42} free {line.free_gb or 'all':>5} exit {line.exit_code} {line.seconds:5.0f} s "
        f"(steps {line.first_step_seconds:.0f} to {line.last_step_seconds:.0f})  "
        f"planned {planned:5.1f} needed {peak:5.1f} GB {off:5} {line.tokens_per_second:7.0f} tokens/s {line.error}"
    )


def write(lines: list[Line], results: Path) -> None:
    """Keep what was measured, with the device and the versions; beside other cases of the same day and versions."""
    import torch

    from qlora_kit.core.environment import capture_environment

    device = torch.cuda.get_device_name().lower().replace(" ", "_")
    place = results / device / f"user_line-{time.strftime('%Y-%m-%d')}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    environment, ran = capture_environment(), {line.case for line in lines}
    before = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    kept = before.get("lines", []) if before.get("environment") == environment else []
    found = [line for line in kept if line["case"] not in ran] + [asdict(line) for line in lines]
    place.write_text(json.dumps({"environment": environment, "lines": found}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def card_of(gigabytes: float) -> Iterator[None]:
    """Leave only so many GB (10^9 bytes) of the GPU free, for as long as this lasts; 0 for all."""
    if not gigabytes:
        yield
        return
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(gigabytes)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        yield
    finally:
        holder.kill()
        holder.wait()


if __name__ == "__main__":
    main()
