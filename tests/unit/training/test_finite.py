"""What is not finite is refused: a logged number, a weight that the last update broke."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from qlora_kit.core.errors import DamagedFileError
from qlora_kit.model.load import load_base
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.finite import NotFiniteError, refuse_base_not_finite, refuse_weights_not_finite
from tests.tiny_models import build_tiny_model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("key", "name"), [("loss", "loss"), ("grad_norm", "gradient norm"), ("eval_loss", "held-out loss")]
)
def test_no_line_is_written_with_a_number_that_is_not_finite(tmp_path, key, name, value):
    rows = []

    class Kept(AllTrackers):
        def log(self, step, metrics):
            rows.append(metrics)

    callback = MetricsCallback(Kept([]), StopOnSignal())
    logs = {"loss": 1.0, "grad_norm": 1.0, key: value, "epoch": 0.5}
    args = TrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(NotFiniteError, match=f"the {name} became {value} by step 7") as told:
        callback.on_log(args, TrainerState(global_step=7), TrainerControl(), logs)
    assert told.value.step == 7
    assert rows == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trained_weight_that_is_not_finite_is_named(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    refuse_weights_not_finite(model, 3)
    with torch.no_grad():
        model[1].get_parameter("bias")[1] = value
    with pytest.raises(NotFiniteError, match=r"1 of 4 trained tensors hold values .* such as 1\.bias, after step 3"):
        refuse_weights_not_finite(model, 3)
    model[1].get_parameter("bias").requires_grad_(False)
    refuse_weights_not_finite(model, 3)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_with_values_that_are_no_numbers_is_refused(name, value, double_quant, tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    quant = QuantConfig(double_quant=double_quant)
    refuse_base_not_finite(load_base(folder, quant), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match=f"1 weight holds values .* not finite numbers, such as {name} "):
        refuse_base_not_finite(load_base(folder, quant), folder)
