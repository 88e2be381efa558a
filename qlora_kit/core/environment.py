"""What a run ran on: versions and hardware, for environment.json."""

import os
import platform
import sys
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


def package_versions() -> dict[str, str]:
    """Installed version of every package that can change a run's numbers."""
    versions = {}
    for name in RECORDED_PACKAGES:
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
