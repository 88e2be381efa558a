"""Numbers of a training that must stay finite: what is not is neither saved nor told as a result."""

import math

import torch

from qlora_kit.core.errors import RunError


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
