"""Starts each job in a process of its own, with its own packages and a limit on its time."""

import fcntl
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
JOB, RESULT, TURN = "job.json", "result.json", "turn"  # in a job's folder; it begins once the last is there


@dataclass(frozen=True)
class Begun:
    """A process of its own, which imports its packages and waits for its turn."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    log: Path
    limit: float

    def result(self) -> dict[str, Any]:
        """Let the process go on, and wait for it; its result has `error` if it failed or took too long."""
        (self.folder / TURN).touch()
        try:
            ended = self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            self.stop()
        place = self.folder / RESULT
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        if ended is None:
            found["error"] = f"took longer than {self.limit:g} s"
        elif "versions" not in found:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
            found["error"] = f"ended with {ended}: {tail}"
        return found

    def stop(self) -> None:
        """End the process with all that it started, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass(frozen=True)
class Machine:
    """Where jobs run.

    Attributes:
        work: folder for rows and logs; nothing in it is worth keeping but the logs.
        bases: folder for the models that are loaded from a disk; others may use it at the same time.
        site: packages of qlora_kit, or None where this Python has them.
        peers_site: packages of the other stacks, or None likewise.
        cpu: whether the GPU is hidden.
        limit: seconds that a run may take.
    """

    work: Path
    bases: Path
    site: Path | None
    peers_site: Path | None
    cpu: bool
    limit: float

    def job(self, kind: str, name: str, run: Run | None = None, **rest: object) -> dict[str, Any]:
        """Do a job at once; see `Begun.result`, and `begin` for the arguments."""
        return self.begin(kind, name, run, **rest).result()

    def begin(self, kind: str, name: str, run: Run | None = None, **rest: object) -> Begun:
        """Start the process of a job.

        Args:
            kind: about, save, train or longest.
            name: of the log.
        """
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.work))
        job = {"kind": kind, "starter": os.getpid(), "run": None if run is None else str(run), **rest}
        (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
        log = self.work / "logs" / f"{re.sub(r'[^a-z0-9_-]+', '-', name.lower())}.log"
        environment = self._environment(is_ours=run is None or run.is_ours, is_longest=kind == "longest")
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "train_step.child", str(folder)],
                env=environment,
                cwd=self.work,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        return Begun(process, folder, log, self.limit if run is not None else PREPARING)

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

    def base(self, run: Run) -> dict[str, Any]:
        """`base` is the folder of the model that a run loads, written here once; empty for one that makes its own."""
        if run.stack != "unsloth" or self.cpu:
            return {"base": ""}
        folder = self.bases / f"base-{run.shape}"
        self.bases.mkdir(parents=True, exist_ok=True)
        with (self.bases / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            failed = {} if folder.is_dir() else self.job("save", folder.name, shape=run.shape, base=str(folder))
        return {"base": str(folder), **({"error": f"no base: {failed['error']}"} if "error" in failed else {})}
