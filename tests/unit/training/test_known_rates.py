"""The rate of a run is kept for the next plan of one like it, and for no other."""

from dataclasses import replace

import pytest

from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import ModelConfig, ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training import known_rates as module
from qlora_kit.training.known_rates import known_rate, note_rate

SHAPE = ModelShape(64, 128, 2, 4, 2, 16, 256, False)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path))
    data = DataConfig(train_file="rows.jsonl", max_tokens=2048)
    return TrainRecipe(model=ModelConfig(source="base"), data=data, trainer=TrainerConfig(batch_size=4))


def test_the_last_run_like_it_tells(recipe):
    assert known_rate(recipe, SHAPE) is None
    note_rate(recipe, SHAPE, 900.0, 50)
    note_rate(recipe, SHAPE, 1000.0, 50)
    longer = replace(recipe, trainer=replace(recipe.trainer, max_steps=9, epochs=7))
    assert known_rate(longer, SHAPE) == 1000.0


@pytest.mark.parametrize(
    "other",
    [
        lambda recipe: replace(recipe, trainer=replace(recipe.trainer, batch_size=2)),
        lambda recipe: replace(recipe, engine=EngineConfig(mode=EngineMode.fast)),
        lambda recipe: replace(recipe, lora=replace(recipe.lora, r=64)),
        lambda recipe: replace(recipe, data=replace(recipe.data, max_tokens=128)),
    ],
)
def test_another_run_tells_nothing(recipe, other):
    note_rate(recipe, SHAPE, 1000.0, 50)
    assert known_rate(other(recipe), SHAPE) is None


def test_another_base_and_another_device_tell_nothing(recipe, monkeypatch):
    note_rate(recipe, SHAPE, 1000.0, 50)
    assert known_rate(recipe, replace(SHAPE, num_layers=4)) is None
    monkeypatch.setattr(module, "_device", lambda: "another")
    assert known_rate(recipe, SHAPE) is None


@pytest.mark.parametrize(("rate", "steps"), [(1000.0, 5), (0.0, 50)])
def test_a_few_steps_are_no_rate(recipe, rate, steps):
    note_rate(recipe, SHAPE, rate, steps)
    assert known_rate(recipe, SHAPE) is None


@pytest.mark.parametrize("text", ["", "[]", '{"tokens_per_second": "fast"}', '{"tokens_per_second": -1}'])
def test_a_damaged_file_is_none(recipe, tmp_path, text):
    note_rate(recipe, SHAPE, 1000.0, 50)
    (file,) = tmp_path.glob("rates/*.json")
    file.write_text(text)
    assert known_rate(recipe, SHAPE) is None


def test_a_cache_that_cannot_be_written_stops_no_run(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file"))
    note_rate(recipe, SHAPE, 1000.0, 50)
    assert known_rate(recipe, SHAPE) is None
