"""Memory that nothing uses yet."""

from pathlib import Path

import psutil

from qlora_kit.core.device import has_nvidia_gpu

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own


def free_memory_bytes() -> float:
    """Memory that nothing uses yet: of the GPU where there is one."""
    if has_nvidia_gpu():
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return free_host_bytes()


def free_host_bytes() -> float:
    """Memory of the host that nothing uses yet, or that its container lets this process have."""
    available = float(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit.isdigit():
            return min(available, float(limit) - float(used) + float(counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return available
