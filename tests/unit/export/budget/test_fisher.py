"""The Fisher information of weights, against autograd on the whole model at once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.export.budget import fisher as module
from qlora_kit.export.budget.fisher import Fisher, fitting_rows
from tests.families import IMAGE_TEXT, build
from tests.tiny_models import build_tiny_model

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(40 + row)] for row in range(3)]


def whole_model_squares(folder: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Squared gradients a token of every weight, by name; labels are drawn as torch draws them from seed 0."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    squares: dict[str, torch.Tensor] = {}
    for row in rows:
        logits = model(torch.tensor([row])).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, parameter in model.named_parameters():
            squares[name] = squares.get(name, torch.zeros(())) + parameter.grad.square() / sum(map(len, rows))
    return squares


# tied and untied heads, biases, layers of two kinds of attention, fused projections
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_each_layer_has_what_autograd_finds(family: str, tmp_path: Path) -> None:
    folder = build_tiny_model(family, tmp_path / family)
    expected = whole_model_squares(folder, ROWS)
    found = {linear.name: linear for linear in Fisher(folder, ROWS).linears()}
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    matrices = {name for name, value in state.items() if ".layers." in name and value.dim() == 2}
    assert {f"{name}.weight" for name in found} == matrices
    for name, linear in found.items():
        assert torch.equal(linear.weight, state[f"{name}.weight"])
        # hidden states are kept in bfloat16
        error = (linear.fisher - expected[f"{name}.weight"]).norm() / expected[f"{name}.weight"].norm()
        assert error < 0.02, name


def test_moments_of_inputs_are_measured_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "m")
    assert all(linear.moment is None for linear in Fisher(folder, ROWS).linears())
    found = {linear.name: linear.moment for linear in Fisher(folder, ROWS, with_moments=True).linears()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]))
    inputs = torch.cat(seen)
    expected, moment = inputs.T @ inputs / len(inputs), found[name]
    assert moment is not None and (moment - expected).norm() < 0.02 * expected.norm()


def test_weights_are_let_go_of(tmp_path: Path) -> None:
    measured = Fisher(build_tiny_model("llama", tmp_path / "m"), ROWS)
    held = [
        sum(not parameter.is_meta for parameter in layer.parameters())
        for linear in measured.linears()
        for layer in measured.layers
        if linear.name.endswith("q_proj")
    ]
    each = len(list(measured.layers[0].parameters()))
    assert held == [0, each, each, 0]  # the last layer, then the first


def test_rows_that_would_fill_memory_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[row] * 10 for row in range(8)]
    assert fitting_rows(rows, 1) == rows
    monkeypatch.setattr(module, "MOST_STATE_BYTES", 400)
    assert capsys.readouterr().err == ""
    assert fitting_rows(rows, 10) == [rows[0], rows[2], rows[4], rows[6]]
    said = "bits budget: measured on 4 of 8 calibration rows, to stay within 2 GiB of hidden states\n"
    assert capsys.readouterr().err == said
    assert fitting_rows(rows, 1000) == rows[:1]


@pytest.mark.parametrize("kind", IMAGE_TEXT)
def test_the_language_model_beside_a_tower_is_measured(kind: str, tmp_path: Path) -> None:
    folder = build(kind, tmp_path)
    found = list(Fisher(folder, ROWS).linears())
    assert len(found) == 14
    assert all(bool(torch.isfinite(linear.fisher).all()) and linear.fisher.sum() > 0 for linear in found)
