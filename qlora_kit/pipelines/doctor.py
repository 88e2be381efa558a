"""`qlora-kit doctor`: what this machine has, what is missing, and the line that mends it."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from qlora_kit.core.cache import cache_folder
from qlora_kit.core.device import has_nvidia_gpu
from qlora_kit.core.extras import DISTRIBUTION, install_line, is_of_extra, requirements
from qlora_kit.core.shell import shell_line
from qlora_kit.core.units import human_bytes
from qlora_kit.formats.registry import FORMATS

PYTHON_RANGE = ((3, 11), (3, 14))
BUNDLES = frozenset({"all", "export", "dev"})  # extras made of other extras, or not for users
COMPILERS = ("c++", "g++", "clang++")


class Health(Enum):
    """How a check came out."""

    ok = "ok"
    missing = "missing"  # optional, and not there
    failed = "failed"


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    value: str
    health: Health = Health.ok
    fix: str = ""


def diagnose() -> list[Check]:
    """Look at Python, the machine, the packages, the extras, the folders and the compiler; imports torch."""
    return [*_machine(), *_devices(), *_packages(), *_extras(), *_folders(), _compiler()]


def check_requirement(requirement: Requirement) -> Check:
    """Whether a package is installed in the range that was tried."""
    name, wanted = requirement.name, str(requirement.specifier)
    line = f"pip install '{name}{wanted}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, f"not installed, wanted {wanted or 'any version'}", Health.failed, line)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Check(name, f"{installed}, wanted {wanted}", Health.failed, line)
    return Check(name, installed)


def extras() -> list[str]:
    """Extras that the installed distribution declares; empty when it is not installed."""
    try:
        return metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _machine() -> Iterator[Check]:
    import psutil

    low, high = PYTHON_RANGE
    version = platform.python_version()
    supported = low <= sys.version_info[:2] < high
    fix = "" if supported else f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    yield Check("python", version, Health.ok if supported else Health.failed, fix)
    yield Check("platform", platform.platform())
    yield Check("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    memory = psutil.virtual_memory()
    yield Check("memory", f"{human_bytes(memory.total)}, {human_bytes(memory.available)} available")


def _devices() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        yield Check("cuda", f"torch was built for {torch.version.cuda}")
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = f"compute capability {device.major}.{device.minor}"
            yield Check(f"gpu {index}", f"{device.name}, {human_bytes(device.total_memory)}, {capability}")
    elif has_nvidia_gpu():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use its driver"
        fix = "install a CUDA build of torch, and a driver at least as new as its CUDA"
        yield Check("cuda", f"there is an NVIDIA device, but {reason}", Health.failed, fix)
    else:
        yield Check("cuda", "no NVIDIA device: runs use the CPU", Health.missing)


def _packages() -> Iterator[Check]:
    wanted = [requirement for requirement in requirements() if requirement.marker is None]
    if not wanted:
        yield Check(
            DISTRIBUTION,
            "runs from a folder, not installed",
            Health.failed,
            shell_line(["pip", "install", "-e", Path(__file__).resolve().parents[2]]),
        )
    for requirement in wanted:
        yield check_requirement(requirement)


def _extras() -> Iterator[Check]:
    for extra in sorted(set(extras()) - BUNDLES):
        parts = [part for part in requirements() if is_of_extra(part, extra)]
        wrong = [found for part in parts if (found := check_requirement(part)).health is Health.failed]
        if wrong:
            value = "; ".join(f"{found.name} {found.value}" for found in wrong)
            yield Check(f"extra {extra}", value, Health.missing, install_line(extra))
        else:
            yield Check(f"extra {extra}", "installed")


def _folders() -> Iterator[Check]:
    for name, folder in {"working folder": Path.cwd(), "cache folder": cache_folder()}.items():
        existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
        try:
            with tempfile.NamedTemporaryFile(dir=existing):
                free = human_bytes(shutil.disk_usage(existing).free)
            yield Check(name, f"{folder}, {free} free")
        except OSError as error:
            yield Check(name, f"{folder}: {error.strerror}", Health.failed, f"make {existing} writable")


def _compiler() -> Check:
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        fix = "install a C++ compiler, such as the packages g++ and python3-dev"
        wants = "; ".join(one.compiles for one in FORMATS.values() if one.compiles)
        return Check("c++ compiler", f"none: {wants}", Health.missing, fix)
    return Check("c++ compiler", found)
