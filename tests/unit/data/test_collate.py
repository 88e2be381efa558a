"""Padding and labels follow the mask of the rows."""

import torch

from qlora_kit.data.collate import Collator, training_features
from qlora_kit.data.render import TokenRow

ROWS = [TokenRow((5, 6, 2), (False, True, True), "a", 1), TokenRow((7, 2), (False, True), "a", 2)]


def test_labels_are_the_trained_tokens_alone():
    assert training_features(ROWS) == [
        {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
        {"input_ids": [7, 2], "labels": [-100, 2]},
    ]


def test_a_batch_is_padded_on_the_right_by_position():
    batch = Collator(pad_token_id=2)(training_features(ROWS))
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # The pad token is also the one that ends an answer: its last place is masked, the answer's own is not.
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
