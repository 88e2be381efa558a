"""The plan's numbers, read off the printed table."""

import json
from pathlib import Path

import pytest

from qlora_kit.pipelines.plan import plan, rows_of
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.model import ModelConfig, ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, False)


def recipe(train_file: Path | None, **trainer) -> TrainRecipe:
    data = DataConfig(train_file=train_file and str(train_file), max_tokens=2048)
    return TrainRecipe(model=ModelConfig(source="base"), data=data, trainer=TrainerConfig(**trainer))


def printed(planned: TrainRecipe) -> dict[str, str]:
    cells = [line.split("│") for line in plan(planned, LLAMA_8B).splitlines() if line.startswith("│")]
    return {row[1].strip(): f"{row[2].strip()} | {row[3].strip()}" for row in cells}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"row": row}) + "\n" for row in range(100)) + "\n", encoding="utf-8")
    return path


def test_parts_total_and_steps(rows):
    table = printed(recipe(rows, batch_size=8, gradient_accumulation=2, epochs=2))
    assert table["weights"].startswith("5.7 GB | 8.0 B weights, nf4 + double quantization")
    assert "41.9 M trained weights" in table["adapter"]
    assert table["total"].startswith("14.9 GB")
    assert table["tokens a step"].startswith("32.8 k")
    assert table["steps"].startswith("14 | 100 rows")  # 13 batches of 8, 7 steps of 2, twice


def test_without_the_file_the_steps_are_unknown(tmp_path):
    assert printed(recipe(tmp_path / "none.jsonl"))["steps"].startswith("unknown")


def test_a_recipe_without_a_train_file_can_be_planned():
    assert printed(recipe(None))["steps"] == "unknown | give data.train_file to count them"


def test_rows_leave_blank_lines_out_and_keep_to_the_limit(rows):
    assert rows_of(rows, None) == 100
    assert rows_of(rows, 7) == 7
    assert rows_of(rows.with_name("none"), None) is None
