"""What a whole checkpoint holds, looked at before it is taken up: a mark tells nothing of who wrote it."""

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

from qlora_kit.core.errors import DamagedFileError
from qlora_kit.core.files import read_json
from qlora_kit.core.shell import override, shell_line
from qlora_kit.training.checkpoint import step_of

_FOREIGN = "is damaged or foreign"
_RAISED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, EOFError, OSError)


def strange_contents(checkpoint: Path, last_step: int) -> Iterator[str]:
    """What says that another run wrote a checkpoint, or somebody else; no code in it runs, no weight is loaded.

    Args:
        last_step: of the run.
    """
    step = step_of(checkpoint)
    if step > last_step:
        yield f"it is of step {step}, and the run has {last_step}"
    try:
        recorded = read_json(checkpoint / "trainer_state.json")["global_step"]
    except (ValueError, KeyError, TypeError):
        yield f"trainer_state.json {_FOREIGN}: it names no step"
    else:
        if type(recorded) is not int or recorded != step:
            yield f"trainer_state.json {_FOREIGN}: it is of step {str(recorded)[:40]}, and its folder of step {step}"
    loaded = {}
    for path in [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *sorted(checkpoint.glob("rng_state*.pth"))]:
        try:
            with safe_globals():
                loaded[path.name] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (*_RAISED, pickle.UnpicklingError):  # the library's words tell how to run the code in it
            yield f"{path.name} {_FOREIGN}: it is more than tensors and numbers, or less"
            continue
        if not isinstance(loaded[path.name], dict):
            yield f"{path.name} {_FOREIGN}: it holds no states by name"
    if len(loaded) == len([name for name in loaded if isinstance(loaded[name], dict)]) and "scheduler.pt" in loaded:
        yield from _schedule(loaded["scheduler.pt"], loaded.get("optimizer.pt", {}), step)


@contextmanager
def told_as_foreign(checkpoint: Path) -> Iterator[None]:
    """Tell of what a library cannot take up from a checkpoint by the checkpoint's name.

    Raises:
        DamagedFileError: the states in it are those of another model or optimizer.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # the device's fault: the checkpoint may be good
        raise
    except (*_RAISED, pickle.UnpicklingError) as error:
        again = shell_line(["qlora-kit", "train", override("resume", checkpoint.parent.parent)])
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"{checkpoint} {_FOREIGN}: what it holds is not of this run's model and optimizer ({reason})"
        raise DamagedFileError(what, str(checkpoint), f"{shell_line(['rm', '-r', checkpoint])} && {again}") from error


def _schedule(schedule: Mapping[str, Any], optimizer: Mapping[str, Any], step: int) -> Iterator[str]:
    rates, groups, done = schedule.get("base_lrs"), optimizer.get("param_groups"), schedule.get("last_epoch")
    if not isinstance(rates, list) or not all(isinstance(rate, float | int) for rate in rates):
        yield f"scheduler.pt {_FOREIGN}: it holds no learning rates"
    elif isinstance(groups, list) and len(rates) != len(groups):
        yield f"scheduler.pt {_FOREIGN}: it has {len(rates)} learning rates, and optimizer.pt {len(groups)} groups"
    if type(done) is not int or not 0 <= done <= step:
        yield f"scheduler.pt {_FOREIGN}: it stands at step {str(done)[:40]}, and the checkpoint at {step}"
