"""An export that is killed leaves nothing that looks finished, and the next call finishes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_kit.core.files import read_json
from tests.e2e.conftest import environment, kit, only_run, train_line

pytestmark = pytest.mark.slow

TARGETS = ["gguf_q4_k_m", "gptq_4bit_g64", "awq_4bit_g64", "merged_16bit"]


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = kit(folder, *train_line(workshop, "trainer.max_steps=2"))
    assert done.returncode == 0, done.stderr
    return folder


def export_line(target):
    return ["export", "run=latest", f"export={target}", "export.score_rows=2", "export.calibration_rows=4"]


@pytest.mark.parametrize("target", TARGETS)
def test_kill_9_during_a_target(trained, target):
    exports = only_run(trained) / "exports"
    started = subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", *export_line(target)],
        cwd=trained,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while not list(exports.glob(f".{target}.*.partial")):
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert list(exports.glob(".*.partial"))
    assert not (exports / target).exists()

    done = kit(trained, *export_line(target), timeout=580)
    assert done.returncode == 0, done.stderr
    assert not list(exports.glob(".*"))
    manifest = read_json(exports / target / "manifest.json")
    assert (exports / target / manifest["file"]).exists()


def test_two_exports_of_one_run_do_not_meet(trained):
    from filelock import FileLock

    with FileLock(only_run(trained) / ".export.lock"):
        done = kit(trained, *export_line("merged_16bit"))
    assert done.returncode == 1
    assert "another export of this run is at work" in done.stderr
