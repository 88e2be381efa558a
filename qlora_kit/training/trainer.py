"""TRL's trainer with the kit's order of rows and a held-out loss that is a mean over tokens."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from qlora_kit.data.collate import IGNORED_LABEL
from qlora_kit.data.tokens import Ints

Order = Callable[[int], Ints]  # number of an epoch -> the items that it reads, in order


class EpochSampler(Sampler[int]):
    """The items of an epoch in the kit's order, the same on every process.

    The epoch is asked for rather than told: accelerate 1.15 cannot tell a sampler its epoch where it skips batches for
    one of several processes (`skip_first_batches`), and a resumed run would read the rows of another epoch.
    """

    def __init__(self, order: Order, items: int, epoch: Callable[[], int]) -> None:
        self.order = order
        self.items = items
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())

    def __len__(self) -> int:
        return self.items


class KitTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's trainer over rows that the kit prepared.

    Attributes:
        order: of the training items.
        undo: what puts the model's own attention and forward back.
    """

    order: Order
    undo: Sequence[Callable[[], None]] = ()

    def restore_model(self) -> None:
        """Take everything off the model that was put on it for training; for when the trainer is not needed again."""
        for undo in reversed(self.undo):
            undo()
        self.undo = ()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        items = len(self.train_dataset if train_dataset is None else train_dataset)
        return EpochSampler(self.order, items, lambda: int(self.state.epoch or 0))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        """Loss of one held-out batch; notes how many tokens it is the mean of."""
        found: tuple[torch.Tensor, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss = found[0].double()
        tokens = (inputs["labels"][..., 1:] != IGNORED_LABEL).sum().to(loss)
        self._held_out += torch.stack((loss * tokens, tokens))
        return found

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over the trained tokens of all batches and processes.

        transformers 5.17 averages the means of the batches instead, so a token in a short batch would count more.
        """
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, tokens = self.accelerator.reduce(self._held_out, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1.0)
        return output
