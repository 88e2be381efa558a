"""Padding, packing and labels follow the mask of the rows."""

from typing import Any

import numpy as np
import pytest
import torch

from qlora_kit.objectives.sft.collate import Collator, CountingCollator, PackedCollator, StaticBatchShape, feature
from qlora_kit.objectives.sft.sft import SFT
from tests.stored_rows import stored_rows

ROWS = [([5, 6, 2], [False, True, True]), ([7, 2], [False, True]), ([9, 8, 4, 2], [True, True, False, True])]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return stored_rows(tmp_path_factory.mktemp("collate") / "store", ROWS)


def test_labels_are_the_trained_tokens_alone(rows):
    one = feature(rows, [0])
    assert one["input_ids"].tolist() == [5, 6, 2]
    assert one["labels"].tolist() == [-100, 6, 2]
    assert one["lengths"].tolist() == [3]
    assert {array.dtype for array in one.values()} == {np.dtype(np.int64)}


def test_samples_of_one_feature_follow_each_other(rows):
    both = feature(rows, np.array([1, 0]))
    assert both["input_ids"].tolist() == [7, 2, 5, 6, 2]
    assert both["labels"].tolist() == [-100, 2, -100, 6, 2]
    assert both["lengths"].tolist() == [2, 3]


def test_a_batch_is_padded_on_the_right_by_position(rows):
    batch: dict[str, Any] = Collator(pad_token_id=2)([feature(rows, [0]), feature(rows, [1])])
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # The pad token is also the one that ends an answer: its last place is masked, the answer's own is not.
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("longest", "widest", "width"),
    [
        (2037, 2048, 2048),
        (2037, 2040, 2040),  # not beyond the longest row
        (2037, None, 2037),
        (1025, 4096, 1056),
        (33, 4096, 33),
        (65, 4096, 66),
        (2048, 2000, 2048),  # rows are never cut
    ],
)
def test_batches_are_padded_to_few_widths_where_that_is_asked_for(longest, widest, width):
    tokens = np.arange(longest)
    batch: Any = Collator(0, widest)([{"input_ids": tokens, "labels": tokens, "lengths": np.array([longest])}])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, width)
    assert batch["attention_mask"].sum() == longest
    assert (batch["labels"][0, longest:] == -100).all()


def test_no_width_is_more_than_a_32nd_wider_than_its_rows():
    widths = {Collator(0, 10**6)._width(longest) for longest in range(1024, 2048)}
    assert len(widths) == 33
    assert all(Collator(0, 10**6)._width(longest) <= longest * (1 + 1 / 32) + 1 for longest in range(1, 5000))


def test_a_packed_batch_is_one_row_without_padding(rows):
    batch: dict[str, Any] = PackedCollator()([feature(rows, [2, 1]), feature(rows, [0])])
    assert batch["input_ids"].tolist() == [[9, 8, 4, 2, 7, 2, 5, 6, 2]]
    # 9 begins a sample, so nothing predicts it, though the row trains it
    assert batch["labels"].tolist() == [[-100, 8, -100, 2, -100, 2, -100, 6, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype is torch.int32
    assert type(batch["max_length_q"]) is int
    assert "attention_mask" not in batch


def test_packing_leaves_the_features_as_they_were(rows):
    one = feature(rows, [2])
    PackedCollator()([one])
    assert one["labels"].tolist() == [9, 8, -100, 2]


def test_a_packed_batch_is_filled_up_by_a_sample_of_its_own(rows):
    batch: dict[str, Any] = PackedCollator(filled_to=8, filler=3)([feature(rows, [1, 0])])
    assert batch["input_ids"].tolist() == [[7, 2, 5, 6, 2, 3, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 6, 2, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 8]
    full: dict[str, Any] = PackedCollator(filled_to=5, filler=3)([feature(rows, [1, 0])])
    assert full["input_ids"].tolist() == [[7, 2, 5, 6, 2]]


def test_rows_of_a_batch_are_laid_into_one_and_filled_up_to_one_of_few_sizes(rows):
    collate = SFT.collator(3, is_packed=False, sizes=(7, 40)).collator
    batch: dict[str, Any] = collate([feature(rows, [2]), feature(rows, [0])])
    assert batch["input_ids"].tolist() == [[9, 8, 4, 2, 5, 6, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7]
    more: dict[str, Any] = collate([*[feature(rows, [2])] * 9, feature(rows, [0])])
    assert more["input_ids"][0, 39:].tolist() == [3]
    assert more["labels"][0, 39:].tolist() == [-100]
    assert more["cu_seq_lens_q"].tolist()[-3:] == [36, 39, 40]


def test_an_outline_gives_batches_of_other_samples_one_look(rows):
    collate = PackedCollator(filled_to=14, filler=3, batch_shape=StaticBatchShape(samples=6, longest=4))
    batch: dict[str, Any] = collate([feature(rows, [1, 0])])
    assert batch["input_ids"].tolist() == [[7, 2, 5, 6, 2, *[3] * 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 5, 9, 13, 14, 14]
    assert batch["max_length_q"] == 4
    other: dict[str, Any] = collate([feature(rows, [2]), feature(rows, [2])])
    assert other["cu_seq_lens_q"].tolist() == [0, 4, 8, 12, 14, 14, 14]
    assert other["labels"][0, 8:].tolist() == [-100] * 6


def test_a_batch_that_does_not_fit_the_outline_keeps_its_own(rows):
    collate = PackedCollator(filled_to=5, batch_shape=StaticBatchShape(samples=1, longest=4))
    many: dict[str, Any] = collate([feature(rows, [1, 0])])
    assert many["cu_seq_lens_q"].tolist() == [0, 2, 5]
    assert many["max_length_q"] == 3
    collate = PackedCollator(filled_to=4, batch_shape=StaticBatchShape(samples=3, longest=2))
    long: dict[str, Any] = collate([feature(rows, [2])])
    assert long["cu_seq_lens_q"].tolist() == [0, 4]
    assert long["max_length_q"] == 4


@pytest.mark.parametrize("collator", [Collator(2), PackedCollator(), PackedCollator(filled_to=20)], ids=type)
def test_trained_positions_are_counted_as_labels_are_shifted(rows, collator):
    features = [feature(rows, [2, 1]), feature(rows, [0])]
    plain, counted = collator(features), CountingCollator(collator)(features)
    assert counted.pop("tokens") == 9
    assert counted.pop("trained_tokens") == sum(label != -100 for row in plain["labels"].tolist() for label in row[1:])
    assert counted.keys() == plain.keys()
    assert all(torch.equal(torch.as_tensor(counted[name]), torch.as_tensor(plain[name])) for name in plain)
