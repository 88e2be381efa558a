"""What `doctor` finds, and the line it gives."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qlora_kit.core.extras import install_line
from qlora_kit.pipelines import doctor
from qlora_kit.pipelines.doctor import Health, check_requirement, diagnose


def test_this_machine_is_described():
    found = {check.name: check for check in diagnose()}
    assert {"python", "platform", "cores", "memory", "cuda", "working folder", "cache folder", "c++ compiler"} <= set(
        found
    )
    assert found["python"].health is Health.ok
    assert int(found["cores"].value) >= 1


def test_an_installed_version_in_range_is_good():
    found = check_requirement(Requirement("packaging>=1"))
    assert found.health is Health.ok


@pytest.mark.parametrize(
    ("line", "value"), [("packaging>=9000", "wanted >=9000"), ("no-such-package>=1", "not installed")]
)
def test_a_package_outside_its_range_comes_with_the_pip_line(line, value):
    found = check_requirement(Requirement(line))
    assert found.health is Health.failed
    assert value in found.value
    assert found.fix == f"pip install '{line}'"


def test_a_missing_extra_is_optional_and_comes_with_the_pip_line(monkeypatch):
    parts = [Requirement("no-such-package>=1; extra == 'wandb'"), Requirement("packaging; extra == 'gguf'")]
    monkeypatch.setattr(doctor, "requirements", lambda: parts)
    monkeypatch.setattr(doctor, "extras", lambda: ["wandb", "gguf"])
    found = {check.name: check for check in doctor._extras()}
    assert found["extra wandb"].health is Health.missing
    assert found["extra wandb"].fix == install_line("wandb")
    assert found["extra gguf"].health is Health.ok


def test_without_a_compiler_it_says_what_wants_one(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = doctor._compiler()
    assert found.health is Health.missing
    assert found.value == "none: the extra gptq compiles a package while it is installed" and "g++" in found.fix


def test_a_folder_that_cannot_be_written_is_bad(monkeypatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    found = {check.name: check for check in doctor._folders()}
    assert found["working folder"].health is Health.failed
    assert "Permission denied" in found["working folder"].value


def test_a_python_out_of_range_is_bad(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert next(doctor._machine()).health is Health.failed


def test_a_gpu_that_torch_cannot_use_is_bad(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    assert next(doctor._devices()).health is Health.failed
