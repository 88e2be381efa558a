"""What a run writes of itself, in which order, and that a run which goes on trains on the rows that it began with."""

import json
from functools import partial

import pytest

from qlora_kit.core import files as files_module
from qlora_kit.core.errors import RecipeError
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training import begun as module
from qlora_kit.training import rows as rows_module
from qlora_kit.training.begun import describe, rows_of
from tests.tiny_tokenizers import smollm_tokenizer

ROWS = [{"prompt": f"what is {number}?", "completion": f"it is {number}"} for number in range(8)]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Prepares the rows of a run as `train` does; `longest` is what the plan says fits."""
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "capture_environment", lambda: {"python": "3"})
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100_000}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    data = DataConfig(train_file=str(tmp_path / "rows.jsonl"), max_tokens="auto", processes=1)
    recipe, tokenizer = TrainRecipe(model=ModelConfig(source=str(tmp_path)), data=data), smollm_tokenizer()

    def begin(longest=500, overrides=None):
        monkeypatch.setattr(rows_module, "longest_row", lambda *_: longest)
        rows = rows_of(recipe, run, tmp_path, tokenizer)
        describe(recipe, run, overrides, rows)
        return rows.summary.train.max_tokens

    return run, begin


def test_a_run_that_goes_on_keeps_what_auto_came_to(begun):
    _, begin = begun
    assert begin(500) == 500
    assert begin(300) == 500


def test_rows_that_changed_since_are_refused(begun, tmp_path):
    _, begin = begun
    begin()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with pytest.raises(RecipeError, match="changed since the run was begun, so its rows are other rows"):
        begin()


def test_the_recipe_is_written_first_and_nothing_twice(begun, monkeypatch):
    run, begin = begun
    written = []
    for name in ("write_text", "write_json"):
        write = getattr(files_module, name)
        noted = partial(lambda write, path, value: written.append(path.name) or write(path, value), write)
        monkeypatch.setattr(module, name, noted)
    begin(overrides=["a=1"])
    assert written[0] == "recipe.yaml"
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
    assert before.keys() == {"recipe.yaml", "written.json", "overrides.txt", "environment.json", "data.json"}
    begin()
    assert {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


def test_a_record_of_the_rows_that_is_gone_is_told_of_where_there_are_steps(begun, capsys):
    run, begin = begun
    told = f"warning: {run.data} is not there, so nothing tells whether its rows are those that it began with"
    begin()
    assert told not in capsys.readouterr().err
    (run.checkpoints / "checkpoint-6").mkdir(parents=True)
    run.data.unlink()
    begin()
    assert capsys.readouterr().err.count(told) == 1 and run.data.exists()


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"train": {}}', '{"train": 5, "held_out": null}'])
def test_a_damaged_record_is_told_of_and_written_again(begun, capsys, damaged):
    run, begin = begun
    begin()
    whole = run.data.read_text()
    run.data.write_text(damaged)
    begin()
    assert f"{run.data} is damaged; it is written again" in capsys.readouterr().err
    assert run.data.read_text() == whole


def test_a_job_of_a_sweep_gets_what_its_recipe_came_without(begun):
    run, begin = begun
    run.recipe.write_text("name: job\n")
    begin()
    assert run.recipe.read_text() == "name: job\n"
    assert run.data.exists() and run.environment.exists()
