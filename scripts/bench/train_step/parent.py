"""Starts each job in a process of its own, with its own packages and a limit on its time."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_step.runs import Run

BENCH = Path(__file__).parents[1]
REPOSITORY = BENCH.parents[1]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
PREPARING = 180  # seconds that a job without a run may take
TAIL = 300  # characters of a log that explain a process that ended without a result


@dataclass(frozen=True)
class Machine:
    """Where jobs run.

    Attributes:
        work: folder for bases, rows and logs; nothing in it is worth keeping but the logs.
        site: packages of qlora_kit, or None where this Python has them.
        peers_site: packages of the other stacks, or None likewise.
        cpu: whether the GPU is hidden.
        limit: seconds that a run may take.
    """

    work: Path
    site: Path | None
    peers_site: Path | None
    cpu: bool
    limit: float

    def job(self, kind: str, name: str, run: Run | None = None, **rest: object) -> dict[str, Any]:
        """Do a job; its result has `error` if it failed or took too long.

        Args:
            kind: about, save, train or longest.
            name: of the log.
        """
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.work))
        place, result = folder / "job.json", folder / "job.result.json"
        job = {"kind": kind, "work": str(folder), "run": None if run is None else str(run), **rest}
        place.write_text(json.dumps(job), encoding="utf-8")
        log = self.work / "logs" / f"{re.sub(r'[^a-z0-9_-]+', '-', name.lower())}.log"
        environment = self._environment(is_ours=run is None or run.is_ours, is_longest=kind == "longest")
        limit = self.limit if run is not None else PREPARING
        ended = _ended([sys.executable, "-m", "train_step.child", str(place)], environment, log, limit)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        if ended is None:
            found["error"] = f"took longer than {limit:g} s"
        elif "versions" not in found:
            found["error"] = f"ended with {ended}: {log.read_text(encoding='utf-8', errors='replace')[-TAIL:].strip()}"
        return found

    def _environment(self, *, is_ours: bool, is_longest: bool) -> dict[str, str]:
        site = self.site if is_ours else self.peers_site
        paths = [str(path.resolve()) for path in (site, BENCH, REPOSITORY) if path is not None]
        before = os.environ.get("PYTHONPATH", "") if site is None else ""
        environment = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}
        if self.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if is_longest:
            environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        return environment

    def base(self, shape: str) -> dict[str, Any]:
        """Write the random base of a shape once; `base` is its folder."""
        folder = self.work / f"base-{shape}"
        failed = {} if folder.is_dir() else self.job("save", f"save-{shape}", shape=shape, base=str(folder))
        return {"base": str(folder), **({"error": failed["error"]} if "error" in failed else {})}


def _ended(line: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """The exit status of a process, or None where it reached the limit and was ended with all that it started."""
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            line, env=environment, cwd=log.parents[1], stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
