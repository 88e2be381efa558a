"""What supervised fine-tuning makes of a batch, against torch's own cross entropy and sums by hand."""

from types import SimpleNamespace

import pytest
import torch

from qlora_kit.objectives.registry import OBJECTIVES
from qlora_kit.objectives.sft.collate import IGNORED_LABEL
from qlora_kit.objectives.sft.sft import SFT
from qlora_kit.schema.model import ModelShape
from qlora_kit.training.callbacks import KEPT_METRICS

LOGITS = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([[-100, 3, 1, -100, 2], [-100, -100, 6, -100, -100]])


def outputs():
    """What a model's forward pass gives for these logits: log-probabilities of what follows each position."""
    following = torch.cat([LABELS[:, 1:], torch.full((2, 1), IGNORED_LABEL)], dim=1)
    mask = following != IGNORED_LABEL
    likely = LOGITS.log_softmax(-1)
    log_probs = likely.gather(-1, following.clamp(min=0)[..., None])[..., 0] * mask
    return SimpleNamespace(log_probs=log_probs, is_top1=(likely.argmax(-1) == following) & mask, label_mask=mask)


INPUTS = {"tokens": 8, "labels": LABELS}


def cross_entropy(reduction):
    return torch.nn.functional.cross_entropy(LOGITS[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction=reduction)


def test_alone_a_batch_has_the_mean_over_its_trained_tokens():
    torch.testing.assert_close(SFT.loss(outputs(), INPUTS, None).loss, cross_entropy("mean"))


def test_of_a_step_it_has_its_share():
    torch.testing.assert_close(SFT.loss(outputs(), INPUTS, 10).loss, cross_entropy("sum") / 10)


def test_sums_of_batches_are_read_as_one():
    right = int(((LOGITS[:, :-1].argmax(-1) == LABELS[:, 1:]) & (LABELS[:, 1:] >= 0)).sum())
    sums = SFT.loss(outputs(), INPUTS, None).sums
    assert sums.tolist() == [right, 4, 8]
    assert SFT.read([3.0, 4.0, 8.0]).metrics == {"mean_token_accuracy": 0.75}
    assert SFT.read((2 * torch.tensor([3.0, 4.0, 8.0])).tolist()).metrics == {"mean_token_accuracy": 0.75}
    assert SFT.read([0.0, 0.0, 8.0]) == type(SFT.read(sums.tolist()))(8, {"mean_token_accuracy": 0.0})


def test_held_out_batches_weigh_as_many_tokens_as_they_train():
    total = SFT.held_out(cross_entropy("mean").float(), INPUTS)
    assert total.dtype is torch.float64
    torch.testing.assert_close(total, torch.stack((cross_entropy("sum"), torch.tensor(4.0, dtype=torch.float64))))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "tile"), [(100, 5000, 2 * 100 * 5000), (9000, 128256, 2 * 4096 * 32768)]
)
def test_the_loss_takes_a_tile_of_the_logits_and_the_hidden_states(tokens, vocabulary, tile):
    shape = ModelShape(4096, 14336, 32, 32, 8, 128, vocabulary, False)
    assert SFT.loss_bytes(shape, tokens, 2) == tile + (2 + 2 + 4) * tokens * 4096


def test_what_an_objective_logs_is_kept():
    assert OBJECTIVES["sft"] is SFT
    assert {name for objective in OBJECTIVES.values() for name in objective.metrics} < set(KEPT_METRICS)
