"""Which of several processes this one is, as the launcher tells it; torch is imported only to wait for the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_kit.core.errors import RecipeError

# What torchrun and launchers of MPI tell each process, as accelerate reads them (accelerate/utils/environment.py)
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def rank() -> int:
    """This process among all, from 0."""
    return next((int(value) for name in RANKS if (value := _told(name)).isdecimal()), 0)


def world_size() -> int:
    """Processes that train together, as torchrun tells it."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process among those of this machine, from 0; also the index of its GPU."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Processes of the training on this machine, which share its memory."""
    return _number("LOCAL_WORLD_SIZE", 1)


def has_process_for_each_gpu() -> bool:
    """Whether a launcher started this process for one of several GPUs."""
    return bool(_told("LOCAL_RANK"))


def is_main() -> bool:
    """Whether this is the process that writes and tells."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here; at once where there is one."""
    if world_size() == 1:
        return
    import torch.distributed

    torch.distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process through the block before the others, which then find what it wrote."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def refuse_several_processes(line: str, doing: str = "a training") -> None:
    """Refuse to be one of several processes, each of which would write the same run.

    Args:
        line: to run without a launcher.
        doing: what is one process.
    Raises:
        RecipeError: a launcher started several.
    """
    for name in SIZES:
        size = _told(name)
        if size not in ("", "1"):
            what = f"{name}={size}: a launcher started several processes, and {doing} is one process on one GPU"
            raise RecipeError(what, "the environment", line)


def _told(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, default: int) -> int:
    value = _told(name)
    return int(value) if value.isdecimal() else default
