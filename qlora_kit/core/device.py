"""Is there a GPU, and do kernels of triton run on it? Asked without importing torch."""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA device is visible to this process; reads device files, not the driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def runs_triton(tensor: "Tensor") -> bool:
    """Whether kernels of triton can work on this tensor."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
