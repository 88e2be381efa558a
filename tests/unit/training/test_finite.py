"""What is not finite is refused: a logged number, a weight that the last update broke."""

import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.finite import NotFiniteError, refuse_weights_not_finite


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
