"""Whether there is a GPU is told by device files, and kernels of triton run on its tensors only."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from qlora_kit.core import device


@pytest.fixture
def machine(monkeypatch):
    """A machine with these device files, whatever this one has."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda *files: monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)


@pytest.mark.parametrize("file", ["/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"])
def test_any_of_its_files_is_a_gpu(machine, file):
    machine(file)
    assert device.has_nvidia_gpu()


def test_other_devices_are_none(machine):
    machine("/dev/null", "/dev/dri")
    assert not device.has_nvidia_gpu()


@pytest.mark.parametrize(("visible", "found"), [("", False), (" ", False), ("-1", False), ("0", True), ("1,2", True)])
def test_a_gpu_that_is_hidden_from_this_process_is_none(machine, monkeypatch, visible, found):
    machine("/dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.has_nvidia_gpu() is found


@pytest.mark.parametrize("is_cuda", [True, False])
@pytest.mark.parametrize("spec", [None, object()], ids=["without", "with"])
def test_triton_needs_its_package_and_a_tensor_on_a_gpu(monkeypatch, is_cuda, spec):
    monkeypatch.setattr(device, "_has_triton", device._has_triton.__wrapped__)  # asks anew each time
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "triton" else None)
    assert device.runs_triton(Mock(is_cuda=is_cuda)) is (is_cuda and spec is not None)


def test_nothing_of_it_imports_torch():
    code = "import sys; from qlora_kit.core.device import *; has_nvidia_gpu(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
