"""One job in a process of its own: `python -m train_step.child JOB.json`; the result is written as JSON beside it."""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from qlora_kit.core.environment import capture_environment, package_versions
from train_step.runs import Run

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo", "liger-kernel")


def write(path: Path, value: object) -> None:
    """Write a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def about() -> dict[str, object]:
    """The device, its driver's software and its ceilings."""
    import torch

    environment = {name: value for name, value in capture_environment().items() if name != "platform"}
    if not torch.cuda.is_available():
        return {"device": "cpu", "environment": environment, "ceiling": {}}
    from train_step.ceiling import ceiling

    return {"device": torch.cuda.get_device_name(0), "environment": environment, "ceiling": ceiling()}


def train(job: dict[str, Any], run: Run, work: Path) -> dict[str, object]:
    """Measure one run."""
    if run.stack == "unsloth":
        from train_step.stacks import unsloth

        return unsloth.train(run, Path(job["base"]))
    if run.is_ours:
        from train_step.stacks import ours

        return ours.train(run, work, profiled=job["profile"])
    from train_step.stacks import peers

    return peers.train(run, work)


def longest(job: dict[str, Any], run: Run, work: Path, result: Path) -> dict[str, object]:
    """Look for the longest row that fits; every try is written at once."""
    from train_step.longest import LAST, attention_in_blocks, fill_all_but, tries

    if job["blocks"]:
        attention_in_blocks()
    if run.stack == "unsloth":
        from train_step.stacks import unsloth

        ballast = fill_all_but(job["gb"])
        step = unsloth.single_steps(run, Path(job["base"]), LAST)
    else:
        from train_step.stacks import ours

        ballast = fill_all_but(job["gb"])
        step = ours.single_steps(run, work)

    def note(seen: list[dict[str, object]]) -> None:
        fitting = [int(str(one["tokens"])) for one in seen if one["fits"]]
        write(result, {"tokens": max(fitting, default=0), "is_final": False, "tries": seen})

    tokens = tries(step, note, job["first"])
    del ballast
    return {**json.loads(result.read_text(encoding="utf-8")), "tokens": tokens, "is_final": True}


def do(job: dict[str, Any], result: Path) -> dict[str, object]:
    """The result of a job."""
    work = Path(job["work"])
    if job["kind"] == "about":
        return about()
    if job["kind"] == "save":
        from train_step.shapes import save_base

        save_base(job["shape"], Path(job["base"]))
        return {}
    run = Run.parse(job["run"])
    return longest(job, run, work, result) if job["kind"] == "longest" else train(job, run, work)


def main() -> None:
    """Do the job; an error is a result too."""
    place = Path(sys.argv[1])
    result = place.with_suffix(".result.json")
    began = time.perf_counter()
    found: dict[str, object]
    try:
        found = do(json.loads(place.read_text(encoding="utf-8")), result)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        before = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        found = {**before, "error": f"{type(error).__name__}: {first}"[:400]}
    write(result, {**found, "process_s": round(time.perf_counter() - began, 1), "versions": package_versions(PACKAGES)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some stacks leave threads behind that would keep the process


if __name__ == "__main__":
    main()
