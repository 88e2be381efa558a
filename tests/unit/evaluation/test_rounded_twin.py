"""The 16-bit model rounded to the nearest values: by hand, and scored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.rounded_twin import round_weights, rounded, score_rounded_twin
from qlora_kit.evaluation.torch_scorer import TorchScorer
from tests.tiny_models import build_tiny_model


def test_weights_go_to_the_nearest_value_of_their_group():
    weight = torch.tensor([[7.0, -3.4, 0.4, 0.6], [0.7, 0.04, 0.0, -0.26]])
    assert torch.allclose(rounded(weight, 4), torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.7, 0.0, 0.0, -0.3]]))
    two = torch.cat([torch.full((1, 128), 1.0), torch.full((1, 128), 100.0)], 1)
    assert torch.equal(rounded(two, 4), two)  # a scale each
    assert torch.equal(rounded(torch.zeros(2, 4), 4), torch.zeros(2, 4))
    assert rounded(torch.zeros(2, 3, 4, dtype=torch.bfloat16), 8).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("twin") / "model")


def test_every_matrix_but_the_ends_is_rounded(folder):
    model, was = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    round_weights(model, 4)
    changed = {
        n for (n, one), other in zip(model.named_parameters(), was.parameters(), strict=True) if (one != other).any()
    }
    assert changed == {name for name, _ in was.named_parameters() if name.endswith("proj.weight")}


@pytest.mark.slow
def test_fewer_bits_are_further_away(folder):
    rows = [TokenRow(tuple(range(5 + start, 25 + start)), (True,) * 20, "f", 1) for start in range(4)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = TorchScorer(model, 0).score(rows, None, 64)
    kl = [score_rounded_twin(folder, bits, rows, reference, 0).mean_kl for bits in (8, 4, 3)]
    assert kl[0] < 0.01 < kl[1] < kl[2]
