"""Whether this process is one of several that a launcher started together."""

import os

from qlora_kit.core.errors import RecipeError

# What torchrun and launchers of MPI tell each process, as accelerate reads them (accelerate/utils/environment.py)
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_several_processes(line: str) -> None:
    """Refuse to be one of several processes, each of which would write the same run.

    Args:
        line: to run without a launcher.
    Raises:
        RecipeError: a launcher started several.
    """
    for name in SIZES:
        size = os.environ.get(name, "").strip()
        if size not in ("", "1"):
            what = f"{name}={size}: a launcher started several processes, and a training is one process on one GPU"
            raise RecipeError(what, "the environment", line)
