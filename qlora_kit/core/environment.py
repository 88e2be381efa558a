"""What a run ran on: versions and hardware, for environment.json."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from qlora_kit.core.extras import DISTRIBUTION, is_of_extra, requirements

ALWAYS = (DISTRIBUTION, "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
FOR_DEVELOPERS = ("dev", "docs")  # extras that change no number of a run


def recorded_packages() -> list[str]:
    """Every package that can change a run's numbers or its files: what this distribution and its extras require."""
    required = [one for one in requirements() if not any(is_of_extra(one, extra) for extra in FOR_DEVELOPERS)]
    return list(dict.fromkeys([*ALWAYS, *(one.name for one in required)]))


def package_versions(names: Iterable[str] | None = None) -> dict[str, str]:
    """Installed version of each of these packages that is there; by default of `recorded_packages`."""
    versions = {}
    for name in recorded_packages() if names is None else names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def capture_environment() -> dict[str, object]:
    """Python, platform, packages and devices; imports torch."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "packages": package_versions(),
    }
