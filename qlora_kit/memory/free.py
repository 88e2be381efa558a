"""Memory that nothing uses yet."""

import psutil

from qlora_kit.core.device import has_nvidia_gpu


def free_memory_bytes() -> float:
    """Memory that nothing uses yet: of the GPU where there is one."""
    if has_nvidia_gpu():
        import torch

        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)
