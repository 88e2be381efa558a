"""A run's rows are read again only as they were; held-out rows may be given later."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from qlora_kit.core.errors import DamagedFileError, RecipeError
from qlora_kit.core.files import write_json
from qlora_kit.data.prepare import prepare
from qlora_kit.data.summary import DataSummary, LongRowCounts, SourceSummary, SplitSummary
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.open import open_run
from qlora_kit.runs.run import Run, refuse_changed
from qlora_kit.runs.same_base import note_base
from qlora_kit.schema.compose import compose_recipe, recipe_yaml
from qlora_kit.schema.data import DataConfig, LaterRows, Task
from qlora_kit.schema.root import TrainRecipe
from tests.prepared_rows import TOKENIZER, write
from tests.tiny_models import build_tiny_model


def summary(train, held_out=None):
    def split(sha256):
        source = SourceSummary("train", sha256, ["messages"], 1, 0, 4, 2, 0.5)
        return SplitSummary(1, 4, 2, 0.5, 4, 64, LongRowCounts(), [source], [])

    return asdict(DataSummary(split(train), split(held_out) if held_out else None))


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (summary({"a": "2"}, {"b": "2"}), "a changed"),
        (summary({"a": "1"}, {"b": "3"}), "b changed"),
        (summary({"a": "0"}, {"c": "2"}), "a, b changed"),
    ],
)
def test_a_changed_file_is_named(tmp_path, now, named):
    with pytest.raises(RecipeError) as caught:
        refuse_changed(summary({"a": "1"}, {"b": "2"}), now, tmp_path / "data.json")
    assert f"{named} since the run was trained, so its rows are other rows" in str(caught.value)
    assert str(tmp_path / "data.json") in str(caught.value)
    assert "put the file back as it was" in str(caught.value)


PAIRS = [(f"question {index}", f"answer {index}") for index in range(20)]


@pytest.fixture
def run(tmp_path):
    """A run on twenty rows, with held-out rows given later."""

    def opened(later=(), most=None, **settings):
        config = DataConfig(train_file=write(tmp_path / "train.jsonl", *PAIRS), max_tokens=64, **settings)
        write_json(tmp_path / "run" / "data.json", asdict(prepare(config, TOKENIZER).summary))
        rows = LaterRows(write(tmp_path / "later.jsonl", *later), most) if later else LaterRows()
        recipe = TrainRecipe(data=config)
        return Run(RunDirectory(tmp_path / "run"), recipe, Base.of(recipe.model, tmp_path), TOKENIZER, rows)

    return opened


@pytest.mark.parametrize("own", [{}, {"eval_rows": 5}])
def test_files_that_are_as_they_were_give_the_rows_that_were_trained_on(run, own):
    opened = run(**own)
    data = opened.rows()
    assert sorted(row.line for part in (data.train, data.held_out or []) for row in part) == list(range(1, 21))
    for row in data.train:
        question, answer = PAIRS[row.line - 1]
        assert question in (text := TOKENIZER.decode(row.input_ids)) and answer in text
    with Path(opened.recipe.data.train_file).open("a", encoding="utf-8") as stream:
        stream.write("\n")  # not even one more row
    with pytest.raises(RecipeError, match=r"train\.jsonl changed since the run was trained"):
        opened.rows()


@pytest.mark.slow
def test_a_run_whose_base_changed_or_whose_adapter_is_strange_is_not_opened(tmp_path):
    base, run = tmp_path / "base", RunDirectory(tmp_path / "run")
    build_tiny_model("llama", base)
    run.adapter.mkdir(parents=True)
    line = ["data=rows", f"model.source={base}", f"data.train_file={write(tmp_path / 'train.jsonl', *PAIRS)}"]
    run.recipe.write_text(recipe_yaml(compose_recipe("train", [*line, "data.max_tokens=64"]).recipe))
    run.result.write_text("{}")
    load_tokenizer(base).save_pretrained(run.adapter)
    note_base(run, base)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    save_file({}, run.adapter / "adapter_model.safetensors")
    write_json(run.adapter / "adapter_config.json", {**settings, "layer_replication": [[0, 2]]})
    with pytest.raises(DamagedFileError, match="which no adapter of the kit has"):
        open_run(str(run.path))
    write_json(run.adapter / "adapter_config.json", settings)
    assert open_run(str(run.path)).base.folder == base
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(RecipeError, match=r"config\.json of the base .* changed since the run was trained"):
        open_run(str(run.path))


@pytest.mark.slow
def test_a_run_without_held_out_rows_says_how_to_give_some(run):
    assert not run().holds_out
    with pytest.raises(RecipeError, match="this run has no held-out rows to score on") as caught:
        run().held_out()
    assert caught.value.problems[0].fix == "data.eval_file=<rows that were not trained on>"


@pytest.mark.parametrize("own", [{}, {"eval_rows": 5}, {"eval_share": 0.2, "eval_rows": 5}])
def test_rows_that_are_given_later_take_the_place_of_the_runs_own(run, own):
    opened = run([("new", "row"), ("other", "row")], **own)
    assert opened.holds_out
    for data in (opened.rows(), opened.held_out()):
        assert len(data.held_out) == len(data.scored(9)) == 2
        assert [row.messages[-1].content for row in data.held_out_conversations()] == ["row", "row"]
    assert len(opened.rows().train) == len(run(**own).rows().train)


def test_rows_that_are_given_later_may_be_capped(run, capsys):
    assert len(run([("new", "row"), ("other", "row")], most=1).held_out().held_out) == 1
    assert "held out: the first 1 row of" in capsys.readouterr().err


def test_a_row_that_was_trained_on_is_refused_by_line(run):
    opened = run([("new", "row"), PAIRS[3]])
    for read in (opened.rows, opened.held_out):
        with pytest.raises(RecipeError, match="1 held-out row is also a training row") as caught:
            read()
        assert f"later.jsonl:2 (training {opened.recipe.data.train_file}:4)" in str(caught.value)


def test_a_row_that_the_run_held_out_itself_was_not_trained_on(run):
    held = {row.line for row in run(eval_rows=5).held_out().held_out}
    opened = run([PAIRS[line - 1] for line in held], eval_rows=5)
    assert len(opened.held_out().held_out) == len(opened.rows().held_out) == 5


def test_training_rows_that_are_gone_are_said_and_the_rows_scored_all_the_same(run, capsys):
    opened = run([PAIRS[3]])
    (opened.base.folder / "train.jsonl").unlink()
    assert len(opened.held_out().held_out) == 1
    said = capsys.readouterr().err
    assert "warning: nothing tells whether rows of" in said and "train.jsonl" in said
    with pytest.raises(RecipeError):
        opened.rows()  # an export calibrates on them


@pytest.mark.slow
def test_the_runs_own_settings_read_the_rows(run, tmp_path):
    opened = run([("new", "not JSON")], eval_rows=5)
    opened.recipe.data.task = Task.json_exact_match
    with pytest.raises(RecipeError, match="but this held-out answer is not JSON"):
        opened.held_out()
    opened.recipe.data.task, opened.recipe.data.columns = Task.none, {"prompt": "q", "completion": "a"}
    Path(opened.later.eval_file).write_text('{"q": "new", "a": "row"}\n', encoding="utf-8")
    (tmp_path / "train.jsonl").unlink()
    (row,) = opened.held_out().held_out_conversations()
    assert [message.content for message in row.messages] == ["new", "row"]


@pytest.mark.parametrize(
    "held", ["{}", '{"train": 5}', '{"train": {"max_tokens": "x", "sources": []}, "held_out": null}']
)
def test_a_damaged_data_json_is_named(run, held):
    opened = run([("new", "row")])
    opened.directory.data.write_text(held, encoding="utf-8")
    for read in (opened.rows, opened.held_out):
        with pytest.raises(RecipeError, match=r"data\.json is damaged"):
            read()
