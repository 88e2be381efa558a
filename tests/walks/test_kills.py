"""Killed at any moment, nothing is lost and nothing is extra: train, export and sweep, and two runs begun at once.

By hand: `pytest -m walk tests/walks/test_kills.py -s`. QLORA_KIT_KILLS=10,5,5,2 makes it short (train, export, sweep,
pairs), QLORA_KIT_SEED draws other moments. Each try is a fork of one process, which has imported everything.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.core.lock import LOCK, holder
from qlora_kit.runs import job_process
from tests.e2e.conftest import train_line, write_rows
from tests.forked import Ended, import_everything, run_forked
from tests.tiny_models import build_tiny_model

pytestmark = [pytest.mark.walk, pytest.mark.timeout(14400)]
TRAIN, EXPORT, SWEEP, PAIRS = (int(count) for count in os.environ.get("QLORA_KIT_KILLS", "100,50,50,10").split(","))
SEED = int(os.environ.get("QLORA_KIT_SEED", "0"))
LONGEST = 300  # seconds of a try that is not killed
# By a clock and not by the run; and that it was resumed, which is true of it alone
MEASURED = {"tokens_per_second", "seconds", "peak_memory_bytes", "planned_memory_bytes", "resumed_from"}
BATCHING = {"padded": "data.batching=padded", "packed": "data.batching=packed"}
EXPORTED = ["export.score_rows=2", "export.calibration_rows=4", "export=[gguf_q8_0,merged_16bit]"]


class ForkedPopen:
    """What `subprocess.Popen` is to a sweep, with a fork in the place of a new interpreter."""

    def __init__(self, command, *, stdin, stdout, stderr, env, start_new_session):
        assert command[:3] == [sys.executable, "-m", "qlora_kit"] and start_new_session
        reads, self._writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.close(self._writes)
                os.dup2(reads, 0)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os.environ.update(env)
                from qlora_kit.cli.verbs import main

                code = main(command[3:])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(reads)

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise subprocess.TimeoutExpired("job", timeout)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Workshop:
    """A base with rows, and folders for tries."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.draw = random.Random(SEED)
        build_tiny_model("llama", place / "base")
        write_rows(place / "train.jsonl", 32, 1, "turn on")
        write_rows(place / "held_out.jsonl", 6, 2, "please start")
        self.home = {"QLORA_KIT_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    def folder(self, name: str) -> Path:
        folder = self.place / "tries" / name
        folder.mkdir(parents=True)
        return folder

    def run(self, words: list[str], folder: Path, limit: float = LONGEST) -> Ended:
        return run_forked(words, folder, self.home, limit)

    def good(self, words: list[str], folder: Path) -> Ended:
        ended = self.run(words, folder)
        assert ended.code == 0, ended.said
        return ended

    def killed(self, words: list[str], folder: Path, of: float) -> Ended:
        return self.run(words, folder, self.draw.uniform(0, of))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    import_everything()
    return Workshop(tmp_path_factory.mktemp("kills"))


def files(folder: Path) -> Counter[str]:
    """Names below a folder; a run that was asked to stop has a checkpoint of that step, and one of another less."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return Counter(re.sub(r"checkpoint-\d+", "checkpoint-N", name) for name in names)


def odd_files(folder: Path, wanted: Counter[str]) -> list[str]:
    return sorted(((found := files(folder)) - wanted) + (wanted - found))[:6]


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def result(run: Path) -> dict[str, float]:
    return {key: value for key, value in json.loads((run / "result.json").read_text()).items() if key not in MEASURED}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(pattern)}


def differences(run: Path, whole: Path) -> list[str]:
    """What of a run is not as in one that nobody interrupted."""
    found = []
    if hashes(run / "adapter", "*.safetensors") != hashes(whole / "adapter", "*.safetensors"):
        found.append("another adapter")
    if metrics(run) != metrics(whole):
        found.append(
            f"other metrics: {[row['step'] for row in metrics(run)]}, not {[row['step'] for row in metrics(whole)]}"
        )
    if result(run) != result(whole):
        found.append(f"another result: {result(run)}, not {result(whole)}")
    if odd := odd_files(run, files(whole)):
        found.append(f"lost or extra files: {odd}")
    return found


def told(name: str, tries: int, states: Counter[str], faults: list[str]) -> None:
    print(f"\n{name}: {tries} kills, {dict(states)}, {len(faults)} not as promised", flush=True)
    for fault in faults:
        print(f"    {fault}", flush=True)
    assert not faults


def where(run: Path | None) -> str:
    """How far a run had come when it was killed."""
    if run is None:
        return "before the folder"
    if (run / "result.json").exists():
        return "at its end"
    if list(run.glob(".adapter.*")) or (run / "adapter").exists():
        return "at the adapter"
    if list(run.glob("checkpoints/*/complete.json")):
        return "behind a checkpoint"
    return "before a checkpoint" if (run / "recipe.yaml").exists() else "before the recipe"


def _none_is_held(jobs: list[Path]) -> bool:
    return not any(holder(job) for job in jobs)


def one_or_none(folder: Path, pattern: str) -> Path | None:
    found = list(folder.glob(pattern))
    assert len(found) < 2, found
    return found[0] if found else None


def only(folder: Path, pattern: str) -> Path:
    found = one_or_none(folder, pattern)
    assert found is not None, pattern
    return found


@pytest.mark.parametrize("batching", BATCHING)
def test_train(shop, batching):
    words = [*train_line(shop.place), "lora.r=4", BATCHING[batching]]
    first = shop.folder(f"whole_{batching}")
    shop.good(words, first)
    shop.good(words, shop.folder(f"again_{batching}"))
    seconds = shop.good(words, shop.folder(f"timed_{batching}")).seconds
    whole = only(first, "outputs/run/*")
    states, faults = Counter[str](), list[str]()
    for number in range(TRAIN // 2):
        folder = shop.folder(f"{batching}_{number}")
        shop.killed(words, folder, seconds)
        run = one_or_none(folder, "outputs/run/*")
        states[state := where(run)] += 1
        if state in ("before the folder", "before the recipe"):
            shop.good(words, folder)
            run = next(iter(folder.glob("outputs/run/*/recipe.yaml"))).parent
        elif state != "at its end":
            ended = shop.run(["train", "resume=latest"], folder)
            if ended.code:
                faults.append(f"{number} {state}: resume ended {ended.code}: {ended.said[-300:]}")
                continue
        assert run is not None
        if state == "at its end" and holder(run) is None:
            (run / LOCK).unlink(missing_ok=True)  # of a killed process: it locks nothing
        if found := differences(run, whole):
            faults.append(f"{number} {state}: {'; '.join(found)}")
        else:
            shutil.rmtree(folder)
    told(f"train, {batching}", TRAIN // 2, states, faults)


def test_export(shop):
    source = shop.folder("exported")
    shop.good([*train_line(shop.place), "lora.r=4", "trainer.max_steps=2"], source)
    words = ["export", "run=latest", *EXPORTED]
    whole = shop.folder("whole_export")
    shutil.copytree(source, whole, dirs_exist_ok=True)
    shop.good(words, whole)
    timed = shop.folder("timed_export")
    shutil.copytree(source, timed, dirs_exist_ok=True)
    seconds = shop.good(words, timed).seconds
    wanted = files(only(whole, "outputs/run/*"))
    weights = {pattern: hashes(whole, f"exports/**/{pattern}") for pattern in ("*.gguf", "*.safetensors")}
    states, faults = Counter[str](), list[str]()
    for number in range(EXPORT):
        folder = shop.folder(f"export_{number}")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        shop.killed(words, folder, seconds)
        run = only(folder, "outputs/run/*")
        done = [path.parent for path in run.glob("exports/[!.]*/manifest.json")]
        states[f"{len(done)} of 2 files"] += 1
        half = [path for path in run.glob("exports/[!.]*") if path not in done]
        before = hashes(run, "exports/[!.]*/*.gguf")
        ended = shop.run(words, folder)
        found = [f"not whole: {half}"] if half else []
        found += [f"ended {ended.code}: {ended.said[-300:]}"] if ended.code else []
        found += [f"lost or extra files: {odd}"] if (odd := odd_files(run, wanted)) else []
        after = {pattern: hashes(folder, f"exports/**/{pattern}") for pattern in weights}
        found += ["other weights"] if after != weights or not before.items() <= after["*.gguf"].items() else []
        if found:
            faults.append(f"{number}: {'; '.join(found)}")
        else:
            shutil.rmtree(folder)
    told("export", EXPORT, states, faults)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + LONGEST
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sweep(shop, monkeypatch):
    monkeypatch.setattr(job_process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": ForkedPopen}))
    line = [word for word in train_line(shop.place)[1:] if not word.startswith("trainer.max_steps")]
    words = ["train", "-m", *line, "trainer.max_steps=4", "lora.r=2,4"]
    first = shop.folder("whole_sweep")
    shop.good(words, first)
    whole = only(first, "outputs/run/sweep_*")
    seconds = shop.good(words, shop.folder("timed_sweep")).seconds
    states, faults = Counter[str](), list[str]()
    for number in range(SWEEP):
        folder = shop.folder(f"sweep_{number}")
        shop.killed(words, folder, seconds)
        sweep = one_or_none(folder, "outputs/run/sweep_*")
        jobs = [] if sweep is None else sorted(path for path in sweep.iterdir() if path.name in "01")
        # The job is no child of what was killed any more: it ends by itself, with a checkpoint.
        wait_until(partial(_none_is_held, jobs))
        time.sleep(0.1)
        states[f"{len(jobs)} of 2 jobs begun"] += 1
        place = [] if sweep is None else [f"hydra.sweep.dir={sweep.relative_to(folder)}"]
        ended = shop.run([*words, *place], folder)
        found = [f"ended {ended.code}: {ended.said[-300:]}"] if ended.code else []
        sweep = sweep or only(folder, "outputs/run/sweep_*")
        for job in ("0", "1"):
            if (sweep / job / "result.json").exists():
                found += [f"job {job}: {fault}" for fault in differences(sweep / job, whole / job)]
            else:
                found.append(f"job {job} has no result")
        rows = json.loads((sweep / "sweep.json").read_text())["rows"] if (sweep / "sweep.json").exists() else []
        found += [] if len(rows) == 2 else [f"{len(rows)} rows"]
        if found:
            faults.append(f"{number}: {'; '.join(found)}")
        else:
            shutil.rmtree(folder)
    told("sweep", SWEEP, states, faults)


def test_pairs(shop):
    """Two runs of one name that begin at once: two folders, each as if it had been alone."""
    lines = [[*train_line(shop.place), "lora.r=4", f"optim.learning_rate={rate}"] for rate in ("1e-2", "1e-3")]
    whole = []
    for number, words in enumerate(lines):
        folder = shop.folder(f"alone_{number}")
        shop.good(words, folder)
        whole.append(only(folder, "outputs/run/*"))
    faults = []
    for number in range(PAIRS):
        folder = shop.folder(f"pair_{number}")
        other = folder.with_name(f"pair_{number}_other")
        other.symlink_to(folder)  # one working folder under two names, for two logs
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = shop.run(lines[0], folder).code
            finally:
                os._exit(code)
        codes = shop.run(lines[1], other).code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        runs = list(folder.glob("outputs/run/*"))
        rates = [float(re.findall(r"learning_rate: (\S+)", (run / "recipe.yaml").read_text())[0]) for run in runs]
        found = [] if codes == (0, 0) and sorted(rates) == [1e-3, 1e-2] else [f"ended {codes}, rates {rates}"]
        for run, rate in zip(runs, rates, strict=True):
            found += differences(run, whole[0 if rate == 1e-2 else 1])
        if found:
            faults.append(f"{number}: {'; '.join(found)}")
    told("two at once", PAIRS, Counter(), faults)
