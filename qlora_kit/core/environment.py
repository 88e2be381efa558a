"""What a run ran on: versions and hardware, for environment.json."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata

RECORDED_PACKAGES = (
    "qlora-kit",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "gguf",
    "libgguf",
    "xllamacpp",
    "gptqmodel",
)


def package_versions(names: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Installed version of each of these packages that is there; by default of all that can change a run's numbers."""
    versions = {}
    for name in names:
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
