"""Is there a GPU? Asked without importing torch."""

import os
from pathlib import Path


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA device is visible to this process; reads device files, not the driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))
