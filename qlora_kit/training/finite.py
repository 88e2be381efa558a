"""Numbers of a training that must stay finite: what is not is neither saved nor told as a result."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from qlora_kit.core.errors import DamagedFileError, RunError
from qlora_kit.core.units import counted


class NotFiniteError(RunError):
    """A loss, a gradient or a trained weight is no finite number any more.

    Attributes:
        step: at which this was seen.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.step = step


def refuse_not_finite(name: str, value: float, step: int) -> None:
    """Refuse a value that is infinite or no number.

    Raises:
        NotFiniteError: it is.
    """
    if not math.isfinite(value):
        raise NotFiniteError(f"the {name} became {value} by step {step}", step)


def refuse_base_not_finite(model: torch.nn.Module, folder: Path) -> None:
    """Refuse a base with a weight that is infinite or no number, which rows may never reach; waits for the device once.

    Args:
        model: as it was loaded; of packed weights the scales tell.
        folder: of the base.

    Raises:
        DamagedFileError: there is one.
    """
    sums = {name: tensor.sum(dtype=torch.float32) for name, tensor in _values(model)}
    whole = torch.stack(list(sums.values())).isfinite().tolist()
    if broken := {name.partition(" ")[0] for name, is_whole in zip(sums, whole, strict=True) if not is_whole}:
        count = counted(len(broken), "weight holds", "weights hold")
        what = f"{count} values of the base that are not finite numbers, such as {min(broken)} in {folder}"
        raise DamagedFileError(what, str(folder), "fetch or copy the folder again, or name another base")


def _values(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a weight's values hang on, under its name and what it is of it."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is None:
            if weight.is_floating_point():
                yield name, weight.detach()
            continue
        nested = getattr(state, "state2", None)
        scales = (state.absmax,) if nested is None else (nested.absmax, state.offset)
        yield from ((f"{name} {number}", scale) for number, scale in enumerate(scales))


def refuse_weights_not_finite(model: torch.nn.Module, step: int) -> None:
    """Refuse trained weights with a value that is infinite or no number; waits for the device once.

    Raises:
        NotFiniteError: there is one.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        return
    whole = torch.stack([weight.detach().isfinite().all() for weight in trained.values()]).tolist()
    if broken := [name for name, is_whole in zip(trained, whole, strict=True) if not is_whole]:
        what = f"{len(broken)} of {len(trained)} trained tensors hold values that are not finite, such as {broken[0]}"
        raise NotFiniteError(f"{what}, after step {step}", step)
