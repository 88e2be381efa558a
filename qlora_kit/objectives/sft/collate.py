"""Token rows -> the tensors of one forward pass: padded side by side, or one after another without padding."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qlora_kit.data.order import filled
from qlora_kit.data.tokens import Ints, TokenRows

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100  # torch's cross entropy skips it
_PAIR = 2
WIDTHS_BITS = 6  # between one power of two and the next there are 32 widths

Feature = Mapping[str, Ints]


def feature(rows: TokenRows, indices: Sequence[int] | Ints) -> Feature:
    """Some rows one after another: `input_ids` and `labels` `[T]`, `lengths` `[rows]`, each int64.

    A token that is not trained has the label -100.
    """
    pairs = [rows.arrays(int(index)) for index in indices]
    input_ids = np.concatenate([ids for ids, _ in pairs]).astype(np.int64)
    trained = np.concatenate([mask for _, mask in pairs])
    lengths = np.array([len(ids) for ids, _ in pairs], dtype=np.int64)
    return {"input_ids": input_ids, "labels": np.where(trained, input_ids, IGNORED_LABEL), "lengths": lengths}


class Collator:
    """Pads a batch on the right to its longest row.

    Args:
        widest: tokens of the longest row of all, where batches are to have few widths, so that layers that are recorded
            for one meet it again: each is padded by up to a 32nd more, but not beyond this.
    """

    def __init__(self, pad_token_id: int, widest: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.widest = widest

    def __call__(self, features: Sequence[Feature]) -> "dict[str, torch.Tensor]":
        """Batch of `input_ids`, `attention_mask` and `labels`, each int64 of shape (rows, longest row or wider).

        Padding is told from its position, so the pad token may be one that also ends an answer.
        """
        import torch

        shape = len(features), self._width(max(len(one["input_ids"]) for one in features))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, one in enumerate(features):
            length = len(one["input_ids"])
            input_ids[row, :length] = one["input_ids"]
            labels[row, :length] = one["labels"]
            attention_mask[row, :length] = 1
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _width(self, longest: int) -> int:
        if self.widest is None:
            return longest
        step = 1 << max(0, (longest - 1).bit_length() - WIDTHS_BITS)
        return max(longest, min(-(-longest // step) * step, self.widest))


class StaticBatchShape(NamedTuple):
    """What every packed batch can be made to look like, whatever its samples are.

    Attributes:
        samples: in a batch; further ones are empty.
        longest: tokens of a sample at the most.
    """

    samples: int
    longest: int


class PackedCollator:
    """Lays the samples of a batch one after another in a single row, and says where each begins.

    Args:
        filled_to: tokens that every batch is filled up to, by samples of which nothing is trained; None fills nothing.
            For attention that is compiled for one length, and layers that are recorded for one.
        sizes: tokens that batches are filled up to, each to the next; see `data.order.row_sizes`.
        filler: the token it is filled with.
        batch_shape: that batches get too; one that does not fit into it keeps its own.
    """

    def __init__(
        self,
        filled_to: int | None = None,
        filler: int = 0,
        batch_shape: StaticBatchShape | None = None,
        *,
        sizes: Sequence[int] = (),
    ) -> None:
        self.filled_to = filled_to
        self.sizes = sizes
        self.filler = filler
        self.batch_shape = batch_shape

    def __call__(self, features: Sequence[Feature]) -> "dict[str, torch.Tensor | int]":
        """A batch of T tokens in S samples, without padding and without an attention mask.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64 of shape (1, T); positions start anew in each sample, and
            the first token of a sample has the label -100, since another sample would predict it.
            `cu_seq_lens_q`, `cu_seq_lens_k`: int32 of shape (S + 1,), where each sample begins, and T.
            `max_length_q`, `max_length_k`: tokens of the longest sample, or of the batch shape's.
        """
        import torch

        input_ids, labels, lengths = (
            np.concatenate([one[name] for one in features]) for name in ("input_ids", "labels", "lengths")
        )
        wanted = filled(len(input_ids), self.sizes) if self.sizes else self.filled_to or 0
        missing = wanted - len(input_ids)
        if missing > 0:
            input_ids = np.append(input_ids, np.full(missing, self.filler))
            labels = np.append(labels, np.full(missing, IGNORED_LABEL))
            lengths = np.append(lengths, _pieces(missing, self.batch_shape.longest if self.batch_shape else missing))
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        labels[bounds[:-1]] = IGNORED_LABEL
        position_ids = np.arange(len(input_ids)) - np.repeat(bounds[:-1], lengths)
        rows = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        longest = int(lengths.max())
        if self.batch_shape and longest <= self.batch_shape.longest and len(lengths) <= self.batch_shape.samples:
            bounds = np.append(bounds, np.full(self.batch_shape.samples - len(lengths), bounds[-1]))
            longest = self.batch_shape.longest
        starts = torch.from_numpy(bounds.astype(np.int32))
        return {
            **{name: torch.from_numpy(array)[None] for name, array in rows.items()},
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }


class CountingCollator:
    """Another collator's batches with two counts: `tokens` of the rows, and of those the `trained_tokens`.

    These are the positions whose next token is trained. Counted here, they need not be read from the device, which
    would wait for all that it has to do.
    """

    def __init__(self, collator: Collator | PackedCollator) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Feature]) -> "dict[str, torch.Tensor | int]":
        """The batch, as the collator makes it, and the counts."""
        batch: dict[str, torch.Tensor | int] = {**self.collator(features)}
        labels: Any = batch["labels"]
        tokens = sum(len(one["input_ids"]) for one in features)
        return {**batch, "tokens": tokens, "trained_tokens": _trained(labels)}


def _pieces(tokens: int, longest: int) -> Ints:
    """Lengths of as few samples as these tokens make."""
    return np.diff(np.append(np.arange(0, tokens, longest), tokens))


def in_halves(batch: "Mapping[str, Any]") -> "tuple[dict[str, Any], dict[str, Any]] | None":
    """A batch of `CountingCollator` as two that hold its rows or samples between them; None where it has but one.

    Padding and filling that only the whole needed is left out.
    """
    if "cu_seq_lens_q" in batch:
        return _samples_in_halves(batch)
    lengths = batch["attention_mask"].sum(dim=1)
    if len(lengths) < _PAIR:
        return None
    middle = len(lengths) // _PAIR
    found = []
    for rows in (slice(None, middle), slice(middle, None)):
        width = int(lengths[rows].max())
        part = {name: batch[name][rows, :width] for name in ("input_ids", "attention_mask", "labels")}
        found.append({**part, "tokens": int(lengths[rows].sum()), "trained_tokens": _trained(part["labels"])})
    return found[0], found[1]


def _samples_in_halves(batch: "Mapping[str, Any]") -> "tuple[dict[str, Any], dict[str, Any]] | None":
    bounds = [bound for bound in batch["cu_seq_lens_q"].tolist() if bound < batch["tokens"]] + [batch["tokens"]]
    if len(bounds) <= _PAIR:
        return None
    half = batch["tokens"] / _PAIR
    middle = min(range(1, len(bounds) - 1), key=lambda place: abs(bounds[place] - half))
    found = []
    for own in (bounds[: middle + 1], bounds[middle:]):
        part = {name: batch[name][:, own[0] : own[-1]] for name in ("input_ids", "labels", "position_ids")}
        starts = batch["cu_seq_lens_q"].new_tensor([bound - own[0] for bound in own])
        longest = max(after - before for before, after in pairwise(own))
        ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        counts = {"tokens": own[-1] - own[0], "trained_tokens": _trained(part["labels"])}
        found.append({**part, **ends, **counts})
    return found[0], found[1]


def _trained(labels: "torch.Tensor") -> int:
    """Positions whose next token is trained."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())
