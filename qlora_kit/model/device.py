"""The device that this process trains and scores on."""

import torch

from qlora_kit.core.distributed import has_process_for_each_gpu, local_rank


def this_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def capability() -> tuple[int, int] | None:
    """CUDA's compute capability of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_capability(this_device()) if torch.cuda.is_available() else None


def idle_gpus() -> int:
    """GPUs that this process sees and leaves alone; 0 where a launcher has one process for each."""
    return 0 if has_process_for_each_gpu() else max(torch.cuda.device_count() - 1, 0)


def peak_memory_bytes() -> int:
    """Highest use so far: allocated GPU memory, or resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
