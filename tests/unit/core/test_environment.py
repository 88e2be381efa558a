"""What a run ran on."""

from importlib import metadata
from typing import Any

from qlora_kit.core.environment import capture_environment, package_versions
from qlora_kit.core.extras import DISTRIBUTION


def test_every_package_that_changes_a_number_or_a_file_is_recorded():
    found = package_versions()
    assert list(found)[:2] == [DISTRIBUTION, "torch"]
    assert {"peft", "llmcompressor", "gptqmodel", "libgguf", "xllamacpp", "wandb"} <= set(found)
    assert not {"ruff", "pytest", "hypothesis"} & set(found)
    assert found["torch"] == metadata.version("torch")


def test_a_package_that_is_not_installed_is_left_out():
    assert package_versions(["torch", "no_such_package"]) == {"torch": metadata.version("torch")}


def test_a_folder_without_a_distribution_records_what_it_finds(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("qlora_kit.core.extras.metadata.requires", absent)
    assert {"torch", "transformers", "peft"} <= set(package_versions())


def test_devices_and_versions_are_captured():
    found: dict[str, Any] = dict(capture_environment())
    assert found["gpus"] == [] or all(isinstance(name, str) for name in found["gpus"])
    assert found["packages"] == package_versions()
    assert found["torch_threads"] >= 1
