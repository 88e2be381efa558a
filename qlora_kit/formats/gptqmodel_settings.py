"""What gptqmodel reads from the environment when it is first used."""

import os

EXTRA = "gptq"  # of pyproject.toml
READER_PACKAGES = ("gptqmodel", "optimum")  # beside transformers, which loads GPTQ and AWQ with them


def set_up_gptqmodel() -> None:
    """Set what suits a small machine, unless the user has."""
    # Its compiled packing needs a C++ compiler and a minute at the first export; the one in torch takes seconds.
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    if (os.cpu_count() or 1) <= 2:
        # Its default there is one worker, and its own model loader asks for two.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
