"""The device that this process trains and scores on."""

import os

import torch


def this_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def idle_gpus() -> int:
    """GPUs that this process sees and leaves alone; 0 where a launcher has one process for each."""
    return max(torch.cuda.device_count() - 1, 0) if "LOCAL_RANK" not in os.environ else 0


def peak_memory_bytes() -> int:
    """Highest use so far: allocated GPU memory, or resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
