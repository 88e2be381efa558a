"""One job in a process of its own: `python -m train_step.child FOLDER`, which holds the job and gets the result."""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qlora_kit.core.environment import capture_environment, package_versions
from train_step.parent import JOB, RESULT, TURN
from train_step.runs import Run

PAUSE = 0.02  # seconds between two looks whether the turn has come
STACKS = {"qlora_kit": "ours", "unsloth": "unsloth"}  # modules; the others share one
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo", "liger-kernel")


def write(path: Path, value: object) -> None:
    """Write a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def about(*, with_ceiling: bool) -> dict[str, object]:
    """The device, its driver's software, and its ceilings if they are wanted."""
    import torch

    environment = {name: value for name, value in capture_environment().items() if name != "platform"}
    found: dict[str, object] = {"device": "cpu", "environment": environment, "ceiling": {}}
    if torch.cuda.is_available():
        from train_step.ceiling import ceiling

        found |= {"device": torch.cuda.get_device_name(0), "ceiling": ceiling() if with_ceiling else {}}
    return found


def import_stack(run: Run) -> ModuleType:
    """The module of a run's stack, and the packages that it needs."""
    return import_module(f"train_step.stacks.{STACKS.get(run.stack, 'peers')}")


def wait_for_turn(folder: Path, starter: int) -> None:
    """Return once the process that started this one lets it go on; end if that one has ended."""
    while not (folder / TURN).exists():
        if os.getppid() != starter:
            os._exit(1)
        time.sleep(PAUSE)


def longest(job: dict[str, Any], run: Run, work: Path) -> dict[str, object]:
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
        write(work / RESULT, {"tokens": max(fitting, default=0), "is_final": False, "tries": seen})

    tokens = tries(step, note, job["first"], job["growth"])
    del ballast
    return {**json.loads((work / RESULT).read_text(encoding="utf-8")), "tokens": tokens, "is_final": True}


def do(job: dict[str, Any], folder: Path) -> dict[str, object]:
    """The result of a job, once its turn has come."""
    run = None if job["run"] is None else Run.parse(job["run"])
    if run is not None and job["kind"] == "train":
        stack = import_stack(run)
        wait_for_turn(folder, job["starter"])
        return dict(stack.train(run, Path(job["base"]), folder, profiled=job["profile"]))
    wait_for_turn(folder, job["starter"])
    if run is not None:
        return longest(job, run, folder)
    if job["kind"] == "about":
        return about(with_ceiling=job["ceiling"])
    from train_step.shapes import save_base

    save_base(job["shape"], Path(job["base"]))
    return {}


def main() -> None:
    """Do the job; an error is a result too."""
    folder = Path(sys.argv[1])
    result = folder / RESULT
    began = time.perf_counter()
    found: dict[str, object]
    try:
        found = do(json.loads((folder / JOB).read_text(encoding="utf-8")), folder)
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
