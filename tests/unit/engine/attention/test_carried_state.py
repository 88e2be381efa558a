"""Layers that carry a state keep the samples of a packed row apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.engine.attention.carried_state import cut, keep_states_apart
from qlora_kit.engine.attention.packed import check_isolation, enable_packed_attention
from qlora_kit.model.load import load_base
from qlora_kit.model.structure import not_adapted, state_carriers
from qlora_kit.objectives.sft.collate import PackedCollator
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import Attention
from qlora_kit.schema.quant import QuantConfig, QuantKind
from tests.families import build

HYBRIDS = ("qwen3_5_text", "falcon_h1", "lfm2", "mamba2")
SAMPLES = [np.arange(10, 10 + length) for length in (7, 40, 3, 21)]


def _packed() -> dict[str, torch.Tensor | int]:
    rows = [{"input_ids": row, "labels": row.copy(), "lengths": np.array([len(row)])} for row in SAMPLES]
    return PackedCollator()(rows)


def _losses(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of all tokens' losses, and its gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        labels = batch["labels"]
        total = total + model(**batch, use_cache=False).loss * (labels[0, 1:] != -100).sum()
    total.backward()
    return total.detach(), [
        one.grad.clone() for one in model.parameters() if one.requires_grad and one.grad is not None
    ]


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_packed_row_has_the_loss_and_gradients_of_its_samples(kind: str, tmp_path: Path) -> None:
    base = load_base(build(kind, tmp_path), QuantConfig(kind=QuantKind.none), compute_dtype=torch.float32)
    model = attach_lora(base, LoraConfig(r=4), not_adapted(base)).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    alone = [{"input_ids": torch.tensor(row)[None], "labels": torch.tensor(row)[None]} for row in SAMPLES]
    expected, gradients = _losses(model, alone)
    undo = enable_packed_attention(base, Attention.sdpa)
    check_isolation(model, Attention.sdpa)
    found, packed = _losses(model, [_packed()])  # type: ignore[list-item]  # lengths beside tensors
    undo()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert len(packed) == len(gradients) > 0
    for one, other in zip(packed, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    again, _ = _losses(model, alone)
    torch.testing.assert_close(again, expected)


def test_without_it_a_state_flows_into_the_next_sample(tmp_path: Path) -> None:
    model = load_base(build("mamba2", tmp_path), QuantConfig(kind=QuantKind.none), compute_dtype=torch.float32)
    batch = {name: value for name, value in _packed().items() if name != "labels"}
    with torch.no_grad():
        flowing = model(**batch, use_cache=False).logits
        undo = keep_states_apart(model)
        assert undo is not None
        apart = model(**batch, use_cache=False).logits
        undo()
    first = len(SAMPLES[0])
    torch.testing.assert_close(flowing[0, :first], apart[0, :first])
    assert (flowing[0, first:] - apart[0, first:]).abs().max() > 1e-3


def test_a_model_of_attention_alone_carries_no_state(tmp_path: Path) -> None:
    model = load_base(build("llama", tmp_path), QuantConfig(kind=QuantKind.none))
    assert state_carriers(model) == []
    assert keep_states_apart(model) is None


def test_a_row_is_cut_into_groups_of_like_length() -> None:
    one = cut(torch.tensor([0, 1, 65, 66, 100, 100], dtype=torch.int32))
    assert [tuple(group.rows.shape) for group in one.groups] == [(2, 1), (2, 64)]
    assert one.tokens == 100
    flat = torch.cat([group.rows.flatten()[group.real] for group in one.groups])
    assert flat[one.back].tolist() == list(range(100))
