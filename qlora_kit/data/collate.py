"""Token rows -> padded batches; the mask of the recipe decides what the loss sees."""

from collections.abc import Sequence

import torch

from qlora_kit.data.render import TokenRow

IGNORED_LABEL = -100  # torch's cross entropy skips it


class Collator:
    """Pads a batch on the right to its longest row."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Batch of `input_ids`, `attention_mask` and `labels`, each int64 of shape (rows, longest row).

        Padding is told from its position, so the pad token may be one that also ends an answer.
        """
        longest = max(len(feature["input_ids"]) for feature in features)
        input_ids = torch.full((len(features), longest), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(features), longest), dtype=torch.int64)
        labels = torch.full((len(features), longest), IGNORED_LABEL, dtype=torch.int64)
        for index, feature in enumerate(features):
            length = len(feature["input_ids"])
            input_ids[index, :length] = torch.tensor(feature["input_ids"], dtype=torch.int64)
            labels[index, :length] = torch.tensor(feature["labels"], dtype=torch.int64)
            attention_mask[index, :length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def training_features(rows: Sequence[TokenRow]) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each row; a token that is not trained has the label -100."""
    return [
        {
            "input_ids": list(row.input_ids),
            "labels": [
                token if trained else IGNORED_LABEL for token, trained in zip(row.input_ids, row.trained, strict=True)
            ],
        }
        for row in rows
    ]
