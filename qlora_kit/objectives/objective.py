"""What every objective answers, whichever is trained; torch-free, so that a plan can ask for the memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qlora_kit.data.packing import Packing
from qlora_kit.data.tokens import TokenRows
from qlora_kit.schema.model import ModelShape

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from qlora_kit.objectives.sft.collate import CountingCollator, StaticBatchShape


@dataclass(frozen=True)
class BatchLoss:
    """What a forward pass comes to.

    Attributes:
        loss: scalar, on the device, to go backward from.
        sums: `[n]` on the device, detached: what is added up over batches and processes until it is logged.
    """

    loss: "torch.Tensor"
    sums: "torch.Tensor"


@dataclass(frozen=True)
class Progress:
    """What sums say once they are read.

    Attributes:
        tokens: that the model was given, padding left out.
        metrics: values by the names in `Objective.metrics`.
    """

    tokens: int
    metrics: Mapping[str, float]


class Objective(Protocol):
    """What training, memory and the log ask of what is learned.

    Attributes:
        name: of its folder.
        metrics: names of what is logged beside the loss.
    """

    name: str
    metrics: Sequence[str]

    def dataset(self, rows: TokenRows, packing: Packing | None = None, multiple: int = 1) -> "Dataset":
        """The items that batches are made of: rows, or bins of a packing.

        Args:
            multiple: the number of items is made one of it, by items of which nothing is trained.
        """

    def collator(
        self,
        pad_token_id: int,
        *,
        is_packed: bool,
        sizes: Sequence[int] = (),
        widest: int | None = None,
        filled_to: int | None = None,
        batch_shape: "StaticBatchShape | None" = None,
    ) -> "CountingCollator":
        """Items -> the tensors of one forward pass.

        Args:
            sizes: tokens that rows are filled up to which lie one after another, as packed ones do, instead of side
                by side.
            widest: tokens of the longest row, where padded batches are to have few widths; None for no padding more.
            filled_to: tokens that every packed batch is filled up to; None fills nothing.
            batch_shape: that packed batches get too.
        """

    def loss(self, outputs: Any, inputs: Mapping[str, Any], trained: "torch.Tensor | int | None") -> BatchLoss:
        """The loss of a batch as its share of the whole step's.

        Args:
            outputs: of the model's forward pass.
            trained: what the step's loss is a mean over, on all processes; None: over this batch alone.
        """

    def read(self, sums: Sequence[float]) -> Progress:
        """What sums of any number of batches say."""

    def held_out(self, loss: "torch.Tensor", inputs: Mapping[str, Any]) -> "torch.Tensor":
        """`[2]` float64: a held-out batch's loss, summed, and how many it is summed over."""

    def loss_bytes(self, shape: ModelShape, tokens: int, wide: int) -> float:
        """Memory that the loss takes beside the layers.

        Args:
            tokens: of one forward pass, padding included.
            wide: bytes of an activation.
        """
