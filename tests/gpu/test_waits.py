"""On a GPU the host runs ahead: once it is under way, no step waits until the device is done."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.data.packing import pack
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.run import build_trainer, run_training
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, UNDER_WAY = 12, 6  # compiled and recorded by then
CALLED = "called a synchronizing CUDA operation"  # that torch warns of; switching it on is worth a warning too


class Listener(TrainerCallback):
    """Asks torch to warn of every wait between the end of one step and that of a later one."""

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == UNDER_WAY:
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batching", list(Batching), ids=lambda batching: batching.name)
@pytest.mark.parametrize("lengths", [[40] * 4 * STEPS, [40, 40, 23, 40] * STEPS], ids=["alike", "not alike"])
def test_no_step_waits_for_the_device(tmp_path, lengths, batching):
    base = build_tiny_model("llama", tmp_path / "base", spread=0.05, dtype=torch.bfloat16)
    recipe = TrainRecipe(
        model=ModelConfig(source="base"),
        data=DataConfig(batching=batching, max_tokens=48),
        optim=OptimConfig(name=OptimizerName.adamw),
        trainer=TrainerConfig(batch_size=4, max_steps=STEPS, log_every_steps=1, save_every_steps=10 * STEPS),
        engine=EngineConfig(mode=EngineMode.fast),
    )
    model = attach_lora(load_base(base, QuantConfig()), recipe.lora)
    rows = drawn_rows(tmp_path / "rows", lengths, seed=1)
    packing = pack(rows.lengths, 48) if batching is Batching.packed else None
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    trainer = build_trainer(
        model, load_tokenizer(base), recipe, rows, None, tmp_path / "checkpoints", callback, packing
    )
    trainer.add_callback(Listener())
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run_training(trainer, None)
            torch.cuda.set_sync_debug_mode("warn")
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    *waits, own = [f"{one.filename}:{one.lineno}" for one in seen if CALLED in str(one.message)]
    assert own.startswith(__file__)  # so torch does tell
    assert waits == []
