"""Hands a command line to Hydra with the verb's word dropped."""

import math
import sys
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from qlora_kit.schema.store import register


def run_under_hydra(verb: str, arguments: list[str], task: Callable[[DictConfig], float | None]) -> None:
    """Let Hydra compose, make output folders and launch `task` once, or once a job with `-m`.

    An exception of the task comes out as it was raised, not as Hydra's message and exit.
    """
    register()
    raised: list[BaseException] = []

    def guarded(tree: DictConfig) -> float | None:
        if raised:  # no job begins after an error that is not a job's own
            return math.nan
        try:
            return task(tree)
        except BaseException as error:
            raised.append(error)
            return math.nan

    saved = sys.argv
    sys.argv = ["qlora-kit", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=None, config_name=verb)(guarded)()
    except SystemExit:
        if not raised:
            raise
    finally:
        sys.argv = saved
    if raised:
        raise raised[0]
