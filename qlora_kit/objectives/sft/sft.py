"""Supervised fine-tuning behind the protocol of objectives."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.data.packing import Packing
from qlora_kit.data.tokens import TokenRows
from qlora_kit.objectives.objective import BatchLoss, Progress
from qlora_kit.objectives.sft.collate import IGNORED_LABEL, Collator, CountingCollator, PackedCollator, StaticBatchShape
from qlora_kit.schema.model import ModelShape

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

LOSS_TOKENS = 4096  # rows of the tile that TRL computes the loss in
LOSS_VOCABULARY = 32768  # columns of it


class Sft:
    """The mean negative log-probability of the tokens that the mask trains; logged with the share of right ones."""

    name = "sft"
    metrics: Sequence[str] = ("mean_token_accuracy",)

    def dataset(self, rows: TokenRows, packing: Packing | None = None, multiple: int = 1) -> "Dataset":
        """One item for each row or bin."""
        from qlora_kit.objectives.sft.dataset import training_dataset

        return training_dataset(rows, packing, multiple)

    def collator(
        self,
        pad_token_id: int,
        *,
        is_packed: bool,
        sizes: Sequence[int] = (),
        widest: int | None = None,
        filled_to: int | None = None,
        batch_shape: StaticBatchShape | None = None,
    ) -> CountingCollator:
        """Rows side by side, or one after another."""
        if sizes:
            return CountingCollator(PackedCollator(None, pad_token_id, batch_shape, sizes=sizes))
        if not is_packed:
            return CountingCollator(Collator(pad_token_id, widest))
        return CountingCollator(PackedCollator(filled_to, 0 if filled_to is None else pad_token_id, batch_shape))

    def loss(self, outputs: Any, inputs: Mapping[str, Any], trained: "torch.Tensor | int | None") -> BatchLoss:
        """The sum over loss tokens by their number in the whole step; sums: right answers, loss tokens, tokens.

        Args:
            outputs: `log_probs` and `is_top1`, zero where nothing is trained, and `label_mask`, each over positions.
            inputs: `tokens`, how many of them are no padding.
        """
        import torch

        here = outputs.label_mask.sum()
        tokens = torch.full_like(here, inputs["tokens"])
        sums = torch.stack((outputs.is_top1.sum(), here, tokens)).detach()
        total = here if trained is None else torch.as_tensor(trained, device=here.device)
        return BatchLoss(-outputs.log_probs.sum() / total.clamp(min=1), sums)

    def read(self, sums: Sequence[float]) -> Progress:
        """The share of loss tokens that were the likeliest ones."""
        right, trained, tokens = sums
        return Progress(int(tokens), {"mean_token_accuracy": right / max(trained, 1)})

    def held_out(self, loss: "torch.Tensor", inputs: Mapping[str, Any]) -> "torch.Tensor":
        """The loss is a mean over the batch's loss tokens."""
        import torch

        summed = loss.double()
        tokens = (inputs["labels"][..., 1:] != IGNORED_LABEL).sum().to(summed)
        return torch.stack((summed * tokens, tokens))

    def loss_bytes(self, shape: ModelShape, tokens: int, wide: int) -> float:
        """TRL never holds all logits: a tile of them, the hidden states twice and their gradient in 32 bit.

        Source: TRL's kernels/chunked_logprob.py.
        """
        tile = wide * min(tokens, LOSS_TOKENS) * min(shape.vocab_size, LOSS_VOCABULARY)
        return tile + (2 * wide + 4) * tokens * shape.hidden_size


SFT = Sft()
