"""Runs the benchmarks of one machine side by side: each GPU does one at a time, and takes the next when it is done.

The first GPU begins with the steps of the 8B shape, ours and the peers'. What compares times is always one job, so that
both sides have one GPU. Packages of the stacks are in folders of their own. What is over `--seconds` is stopped,
and every row measured until then is kept:

    python scripts/bench/session.py --work /tmp/session --site /tmp/site --peers-site /tmp/peers \\
        --quantizers-site /tmp/quantizers --base FOLDER --text /usr/lib/python3.12 --seconds 1500

Writes the files that the single benchmarks would write, into --results; logs are in --work.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_step.parent import BENCH, OFFLINE, REPOSITORY

SPEED = (
    "qlora_kit:few_copies:bf16:8b:4x2048",
    "unsloth:no_recompute:bf16:8b:4x2048",
    "qlora_kit:fast:fp8_backward:8b:4x2048",
    "qlora_kit:fast:fp8:8b:4x2048",
    "qlora_kit:least_memory:bf16:8b:4x2048",
    "unsloth:default:bf16:8b:4x2048",
    "qlora_kit:fast:bf16:8b:1x2048",
    "unsloth:no_recompute:bf16:8b:1x2048",
    "qlora_kit:fast:bf16:8b:1x8192",
    "unsloth:no_recompute:bf16:8b:1x8192",
    "qlora_kit:fast:bf16:8b:packed-4x2048",
    "unsloth:no_recompute:bf16:8b:packed-4x2048",
    "qlora_kit:fast:bf16:8b:1x32768",
    "unsloth:default:bf16:8b:1x32768",
)
LARGE = (
    "qlora_kit:fast:bf16:70b:1x2048",
    "unsloth:default:bf16:70b:1x2048",
    "qlora_kit:fast:bf16:70b:1x8192",
    "unsloth:default:bf16:70b:1x8192",
)
SMALL = ("qlora_kit:fast:bf16:1b:4x2048", "unsloth:no_recompute:bf16:1b:4x2048", "unsloth:default:bf16:1b:4x2048")
PROFILED = ("qlora_kit:few_copies:bf16:8b:4x2048", "qlora_kit:fast:fp8:8b:4x2048")
LONGEST = {  # stack, and by GB the tokens that are tried first
    "qlora_kit:fast:bf16": {24: 163_840, 80: 655_360},
    "unsloth:default:bf16": {24: 57_344, 80: 233_472},
}
GROWTH = 1.125  # from one length to the next
TAKING = threading.Lock()
GRACE = 20  # seconds that a job has to end once it is asked to


@dataclass(frozen=True)
class Job:
    """A command of its own, which finds packages in `site` first; what is not timed shares a GPU with its like."""

    name: str
    line: tuple[str, ...]
    site: Path | None = None
    is_timed: bool = True


def jobs(chosen: argparse.Namespace) -> list[Job]:
    """All of them; the first is for GPU 0, the others in the order in which they are begun."""

    def steps(name: str, *more: str, only: tuple[str, ...] = ()) -> Job:
        sites = ("--site", str(chosen.site), "--peers-site", str(chosen.peers_site))
        work = ("--work", str(chosen.work / name), "--bases", str(chosen.work / "bases"))
        limits = ("--limit", "240", "--longest-limit", "500")
        return Job(name, ("train_step.py", "--only", *only, *sites, *work, *limits, *more))

    def longest(gigabytes: int, stack: str) -> Job:
        name = f"longest_{gigabytes}_{stack.partition(':')[0]}"
        first = ("--longest-first", str(LONGEST[stack][gigabytes]), "--longest-growth", str(GROWTH))
        blocks = ("--longest-of", stack, "--longest-in-blocks", "--no-ceiling")
        return steps(name, "--longest", str(gigabytes), *blocks, *first)

    quantize = ("--layers", "1", "3", "--rows", "64", "--work", str(chosen.work / "quantize"))
    picture = ("--picture", str(chosen.work / "parity.svg"))
    parity = ("parity.py", "--base", str(chosen.base), "--text", str(chosen.text), *picture)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "4", "--dist", "loadfile", "tests/gpu")
    return [
        steps("speed", "--ahead", "--profile", *PROFILED, only=(*SPEED, *SMALL)),
        steps("large", "--no-ceiling", only=LARGE),
        Job("quantize", ("quantize_8b.py", *quantize), chosen.quantizers_site),
        *(longest(gigabytes, stack) for gigabytes in (80, 24) for stack in LONGEST),
        Job("parity", parity, is_timed=False),
        Job("tests", tests, is_timed=False),
    ]


def run(job: Job, gpu: int, chosen: argparse.Namespace, end: float) -> str:
    """Do a job on one GPU; how it ended, in words."""
    places = (job.site, chosen.site, BENCH, REPOSITORY, os.environ.get("PYTHONPATH"))
    paths = [str(place) for place in places if place]
    environment = {**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONPATH": os.pathsep.join(paths)}
    line = list(job.line)
    if line[0].endswith(".py"):
        line = [str(BENCH / line[0]), *line[1:], "--results", str(chosen.work / "results" / job.name)]
    with (chosen.work / f"{job.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *line], env=environment, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return f"ended with {process.wait(max(end - time.monotonic(), 1))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C: a benchmark ends its own processes then
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            return "was stopped: the time is over"


def hear_interrupts() -> None:
    """Jobs are stopped as by Ctrl-C, and would inherit that a shell lets what runs in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def work_on(gpu: int, waiting: deque[Job], chosen: argparse.Namespace, end: float) -> None:
    """What one GPU does until the time is over, or nothing is left."""
    began = time.monotonic()

    def done(job: Job) -> None:
        print(f"{time.monotonic() - began:5.0f} s  GPU {gpu}  {job.name} begins", flush=True)
        how = run(job, gpu, chosen, end)
        print(f"{time.monotonic() - began:5.0f} s  GPU {gpu}  {job.name} {how}", flush=True)

    while time.monotonic() < end and (jobs := taken(waiting)):
        with ThreadPoolExecutor(len(jobs)) as side_by_side:
            list(side_by_side.map(done, jobs))


def taken(waiting: deque[Job]) -> list[Job]:
    """The next job, and with one that is not timed all others that are not; no more if none is left."""
    with TAKING:
        jobs = [waiting.popleft()] if waiting else []
        while jobs and not jobs[0].is_timed and waiting and not waiting[0].is_timed:
            jobs.append(waiting.popleft())
        return jobs


def joined(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of train_step.py from several jobs, as one run of it would have written them."""
    whole = dict(contents[0])
    for other in contents[1:]:
        whole["versions"] = {**other["versions"], **whole["versions"]}
        for part in ("rows", "longest"):
            whole[part] = whole[part] + other[part]
    return whole


def results_of(work: Path, names: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every file of results with its place below the folder of results, those of one place joined."""
    found: dict[Path, list[dict[str, Any]]] = {}
    for name in names:
        for path in sorted((work / "results" / name).glob("*/*.json")):
            found.setdefault(path.relative_to(work / "results" / name), []).append(json.loads(path.read_text()))
    for place, contents in found.items():
        yield place, joined(contents) if len(contents) > 1 else contents[0]


def gather(work: Path, names: list[str], results: Path) -> None:
    """Write what the jobs measured so far."""
    for place, content in results_of(work, names):
        (results / place).parent.mkdir(parents=True, exist_ok=True)
        (results / place).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(results / place)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="for bases, rows, logs; a disk with 150 GB")
    parser.add_argument("--site", type=Path, help="packages of qlora_kit, unless this Python has them")
    parser.add_argument("--peers-site", type=Path, help="packages of the other stacks")
    parser.add_argument("--quantizers-site", type=Path, help="llmcompressor, gptqmodel and what they need")
    parser.add_argument("--base", type=Path, help="a small real model, for parity")
    parser.add_argument("--text", type=Path, help="a folder of text, for parity")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--gpus", type=int, help="how many; all unless given")
    parser.add_argument("--only", nargs="*", metavar="JOB", help="in the order of the others; all unless given")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--gather", action="store_true", help="only write what was measured in --work")
    return parser.parse_args()


def main() -> None:
    """Share the jobs among the GPUs, then write the results."""
    hear_interrupts()
    chosen = arguments()
    chosen.work = chosen.work.resolve()
    (chosen.work / "results").mkdir(parents=True, exist_ok=True)
    every = jobs(chosen)
    names = [job.name for job in every]
    if not chosen.gather:
        import torch

        count, end = chosen.gpus or torch.cuda.device_count(), time.monotonic() + chosen.seconds
        wanted = [job for job in every if chosen.only is None or job.name in chosen.only]
        first = deque(job for job in wanted if job is every[0])
        others = deque(job for job in wanted if job is not every[0])

        def whole_queue(gpu: int) -> None:
            if gpu == 0:
                work_on(gpu, first, chosen, end)
            work_on(gpu, others, chosen, end)

        with ThreadPoolExecutor(count) as gpus:
            list(gpus.map(whole_queue, range(count)))
    gather(chosen.work, names, chosen.results)


if __name__ == "__main__":
    main()
