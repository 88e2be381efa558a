"""Every issue of the checks on rows: the field it names, what it says, and a line that mends it."""

import pytest

from qlora_kit.core.shell import is_line
from qlora_kit.data.formats.columns import OPTIONAL, REQUIRED
from qlora_kit.schema.check_data import check_data
from qlora_kit.schema.data import FIELDS, Batching, DataConfig, SourceConfig, Task
from qlora_kit.schema.model import Attention, ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    return str(path)


def found(trainer=None, attention=Attention.sdpa, **data):
    model = ModelConfig(source="demo", attention=attention)
    recipe = TrainRecipe(model=model, data=DataConfig(**{"max_tokens": 64, **data}), trainer=trainer or TrainerConfig())
    return {issue.path: (issue.what, issue.fix) for issue in check_data(recipe)}


def test_good_recipes_have_no_issue(file, tmp_path):
    assert found(train_file=file) == {}
    assert found(train_file=str(tmp_path / "*.jsonl")) == {}
    assert found(train_file=str(tmp_path)) == {}
    assert found(train_file=file, max_tokens="auto", eval_share=0.1, task=Task.exact_match) == {}
    assert found(train_file=file, eval_share=0.1, eval_rows=3, eval_file=file) == {}
    assert found(sources={"a": SourceConfig(path=file, weight=1), "b": SourceConfig(path=file, weight=2)}) == {}
    assert found(sources={"a": SourceConfig(path="owner/name", revision="abc")}) == {}
    assert found(train_file=file, batching=Batching.packed) == {}


def cases(file):
    one = {"a": SourceConfig(path=file)}
    return {
        "no rows": ({}, "data.train_file", "there are no training rows", "data.train_file=<a file of rows>"),
        "two ways": (
            {"train_file": file, "sources": one},
            "data.sources",
            "data.train_file and data.sources are both set; a run trains on one or the other",
            "data.train_file=null",
        ),
        "rows of a mix": (
            {"sources": one, "train_rows": 3},
            "data.train_rows",
            "data.train_rows counts the rows of data.train_file; a mix has a count for each source",
            "data.sources.<name>.rows=<count>",
        ),
        "weight and rows": (
            {"sources": {"a": SourceConfig(path=file, weight=1, rows=2)}},
            "data.sources.a.rows",
            "data.sources.a has both a weight and a number of rows; a source has one of them",
            "data.sources.a.rows=null",
        ),
        "one weight": (
            {"sources": {"a": SourceConfig(path=file, weight=1), "b": SourceConfig(path=file)}},
            "data.sources.b.weight",
            "data.sources.b has no weight, but a has; give a weight to every source or to none",
            "data.sources.b.weight=1",
        ),
        "no file": (
            {"train_file": "none.jsonl"},
            "data.train_file",
            "no such file: none.jsonl",
            "data.train_file=<a file of rows>",
        ),
        "no name of a file": (
            {"train_file": "x" * 400},
            "data.train_file",
            f"no such file: {'x' * 400}",
            "data.train_file=<a file of rows>",
        ),
        "no such user": (
            {"train_file": "~nobody_of_this_name/a"},
            "data.train_file",
            "no such file: ~nobody_of_this_name/a",
            "data.train_file=<a file of rows>",
        ),
        "held-out rows of a recipe beside rows of one's own": (
            {"train_file": file, "eval_file": "data/home_commands/held_out.jsonl"},
            "data.eval_file",
            "no such file: data/home_commands/held_out.jsonl",
            "data.eval_file=null data.eval_share=0.02",
        ),
        "glob of nothing": (
            {"train_file": "none-*.jsonl"},
            "data.train_file",
            "no such file: none-*.jsonl",
            "data.train_file=<a file of rows>",
        ),
        "hub id without a commit": (
            {"sources": {"a": SourceConfig(path="owner/name")}},
            "data.sources.a.path",
            "no such file: owner/name",
            "data.sources.a.revision=<commit>, if owner/name is a hub id",
        ),
        "task without rows": (
            {"train_file": file, "task": Task.exact_match},
            "data.task",
            "data.task=exact_match is set, but there are no held-out rows whose answers it could judge",
            "data.eval_share=0.02",
        ),
        "a word for a length": (
            {"train_file": file, "max_tokens": "many"},
            "data.max_tokens",
            "data.max_tokens must be a number of tokens or auto, got many",
            "data.max_tokens=2048",
        ),
        "too short": (
            {"train_file": file, "max_tokens": 1},
            "data.max_tokens",
            "data.max_tokens must be at least 2 tokens, got 1",
            "data.max_tokens=2",
        ),
        "unknown role": (
            {"train_file": file, "roles": {"customer": "human"}},
            "data.roles",
            "data.roles maps customer to human, which is no role; there are system, developer, user, assistant, tool",
            "'data.roles={customer:user}'",
        ),
        "unknown field": (
            {"train_file": file, "columns": {"question": "q"}},
            "data.columns",
            "data.columns names question, which is no field of ours; there are messages, role, content",
            "data.columns={prompt: <your column>}",
        ),
        "packed and eager": (
            {"train_file": file, "batching": Batching.packed, "attention": Attention.eager},
            "model.attention",
            "eager attention cannot keep packed rows apart: it would build a mask of every token against every other",
            "model.attention=sdpa or data.batching=padded",
        ),
    }


@pytest.mark.parametrize("name", cases("x"))
def test_every_contradiction_is_named_with_a_line_to_paste(name, file):
    settings, path, what, fix = cases(file)[name]
    issues = found(**settings)
    assert path in issues, issues
    assert issues[path][0].startswith(what)
    assert issues[path][1] == fix
    assert "<" not in fix or not is_line(fix), fix  # something is left to fill in


def test_held_out_loss_by_steps_needs_held_out_rows(file):
    issues = found(trainer=TrainerConfig(eval_every_steps=5), train_file=file)
    assert issues["trainer.eval_every_steps"][0] == "trainer.eval_every_steps is set, but there are no held-out rows"


def test_the_columns_that_may_be_named_are_those_that_are_read():
    read = {field for fields in (*REQUIRED.values(), *OPTIONAL.values()) for field in fields}
    assert set(FIELDS) == read | {"role", "content"}
