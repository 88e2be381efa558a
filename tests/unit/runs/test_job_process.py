"""A job hears of a stop through its sweep, is waited for, and ends when the sweep is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from qlora_kit.runs.job_process import STOP, SweepStop, run_process

JOB = """
import signal, sys, time
from pathlib import Path
from qlora_kit.runs.job_process import end_with_sweep

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
end_with_sweep()
folder = Path(sys.argv[1])
(folder / "begun").touch()
until = time.monotonic() + 60
while not heard and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))  # it writes a checkpoint
(folder / "saved").write_text(str(len(heard)))
sys.exit(1)
"""

SWEEP = """
import os, sys
from pathlib import Path
from qlora_kit.runs.job_process import SweepStop, run_process
folder = Path(sys.argv[1])
run_process(sys.argv[2:], folder / "log", os.environ, SweepStop(folder), os.getpid())
"""


WORKER = """
import os, sys, time
from pathlib import Path
from qlora_kit.runs.job_process import SweepStop, run_process
folder = Path(sys.argv[1])
(folder / "worker").write_text(str(os.getpid()))
run_process(sys.argv[2:], folder / "log", os.environ, SweepStop(folder), os.getppid())
time.sleep(90)  # until more work comes
"""
SWEEP_OF_WORKERS = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def job(folder, saving=0.3):
    return [sys.executable, "-c", JOB, str(folder), str(saving)]


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def when_begun(folder, act):
    def wait_and_act():
        wait_for(folder / "begun")
        act()

    threading.Thread(target=wait_and_act, daemon=True).start()


def test_a_stop_in_the_sweeps_folder_reaches_the_job_once_and_its_checkpoint_is_waited_for(tmp_path):
    stop = SweepStop(tmp_path)
    when_begun(tmp_path, (tmp_path / STOP).touch)
    assert run_process(job(tmp_path), tmp_path / "log", os.environ, stop, os.getpid()) == 1
    assert (tmp_path / "saved").read_text() == "1"
    assert stop.asked
    stop.withdraw()
    assert not stop.asked


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_of_the_sweep_is_passed_on_and_a_second_one_too(tmp_path, number):
    stop = SweepStop(tmp_path)
    when_begun(tmp_path, lambda: (os.kill(os.getpid(), number), time.sleep(0.6), os.kill(os.getpid(), number)))
    with stop.listening():
        assert run_process(job(tmp_path, 2), tmp_path / "log", os.environ, stop, os.getpid()) == 1
    assert (tmp_path / "saved").read_text() == "2"


def test_a_job_ends_with_a_sweep_that_is_killed(tmp_path):
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path), *job(tmp_path)])
    wait_for(tmp_path / "begun")
    sweep.kill()
    sweep.wait()
    wait_for(tmp_path / "saved")


def test_so_does_a_worker_of_a_sweep_that_runs_several_at_once(tmp_path):
    worker = [sys.executable, "-c", WORKER, str(tmp_path), *job(tmp_path)]
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP_OF_WORKERS, *worker])
    wait_for(tmp_path / "begun")
    sweep.kill()
    sweep.wait()
    wait_for(tmp_path / "saved")
    number = int((tmp_path / "worker").read_text())
    until = time.monotonic() + 20
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
