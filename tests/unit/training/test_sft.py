"""TRL receives the kit's rows as they are: no cut, no packing, the kit's mask, fp32 adapters."""

import pytest
import torch

from qlora_kit.adapter.attach import adapter_size, attach_lora
from qlora_kit.data.collate import Collator, training_features
from qlora_kit.data.render import TokenRow
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.optim import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import StopOnSignal, Watch
from qlora_kit.training.sft import build_trainer, sft_config
from tests.tiny_models import build_tiny_model

LONG = 1500  # TRL's own default cuts at 1,024


def row(length, trained_from, line):
    ids = tuple(5 + (7 * line + position) % 500 for position in range(length))
    return TokenRow(ids, tuple(position >= trained_from for position in range(length)), "rows.jsonl", line)


@pytest.fixture(scope="module")
def recipe():
    quant = QuantConfig(compute_dtype=ComputeDtype.float32)
    return TrainRecipe(quant=quant, trainer=TrainerConfig(batch_size=2, max_steps=2, gradient_checkpointing=False))


@pytest.fixture(scope="module")
def trainer(recipe, tmp_path_factory):
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("sft") / "base", max_position_embeddings=2048)
    model = attach_lora(load_base(folder, recipe.quant), recipe.lora)
    watch = Watch(AllTrackers([]), StopOnSignal())
    rows = [row(LONG, 1400, 1), row(30, 20, 2)]
    return build_trainer(model, load_tokenizer(folder), recipe, rows, rows, folder.parent / "checkpoints", watch)


def test_rows_reach_the_loss_whole(trainer):
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [LONG, 30]


def test_the_loss_is_that_of_the_kits_mask(trainer):
    rows = [row(40, 25, 3), row(12, 4, 4)]
    batch = {name: part.to(trainer.model.device) for name, part in Collator(0)(training_features(rows)).items()}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)  # measured: 2e-7
    assert int((batch["labels"] != -100).sum()) == 15 + 8


def test_adapters_are_trained_in_fp32(trainer):
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    assert adapter_size(trainer.model).modules == 14


def test_no_default_of_trl_cuts_packs_or_hides(recipe, tmp_path):
    config = sft_config(recipe, OptimizerName.adamw, tmp_path, rows=8, evaluates=False)
    assert config.max_length is None
    assert config.packing is False
    assert config.dataset_kwargs == {"skip_prepare_dataset": True}
    assert config.logging_nan_inf_filter is False
    assert config.report_to == []
    assert config.output_dir == str(tmp_path)
