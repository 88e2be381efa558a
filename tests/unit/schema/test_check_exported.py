"""What a recipe may not say about what it exports or scores."""

from typing import Any

import pytest

from qlora_kit.schema.check_exported import check_evaluated, check_exported
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.data import AUTO, DataConfig, LaterRows
from qlora_kit.schema.export import AdapterTarget, ExportConfig, GgufTarget, MergeBase
from qlora_kit.schema.root import EvalRecipe, ExportRecipe

GGUF = ExportConfig(gguf={"a": GgufTarget()})
NO_DATA = DataConfig(max_tokens=AUTO)


def found(option=None, **fields):
    recipe = ExportRecipe(**{"export": GGUF, "data": NO_DATA, **fields})
    return {issue.path: (issue.what, issue.fix) for issue in check_exported(recipe, option)}


def test_a_run_a_base_and_the_newest_run_pass():
    assert found() == found(run="latest") == found(base="folder") == {}
    assert found(base="folder", out="mine", revision="abc") == {}


def test_eval_is_of_a_run_or_of_a_base():
    assert (
        check_evaluated(EvalRecipe())
        == check_evaluated(EvalRecipe(run="r"))
        == check_evaluated(EvalRecipe(base="b"))
        == []
    )
    (both,) = check_evaluated(EvalRecipe(run="r", base="b"))
    assert (both.path, both.fix) == ("base", "run=r, or base=b, not both")
    assert both.what == "run=r and base=b are both set; one eval is of a trained run or of a base"
    (empty,) = check_evaluated(EvalRecipe(base=""))
    assert (empty.what, empty.fix) == ("base is empty", "base=<folder of its exports>")


def test_rows_for_a_base_pass(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    data = DataConfig(train_file=str(tmp_path / "rows.jsonl"), max_tokens=64)
    assert found(option="rows", base="folder", data=data) == {}


CASES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "both": (
        {"run": "latest", "base": "b"},
        "base",
        "run=latest and base=b are both set; one export is of a trained run or of a base",
        "run=latest, or base=b, not both",
    ),
    "empty": ({"base": " "}, "base", "base is empty", "base=<folder of a model in Hugging Face format>"),
    "adapter": (
        {"base": "b", "export": ExportConfig(adapter={"adapter_peft": AdapterTarget()})},
        "export",
        "adapter_peft writes an adapter alone, and a base model has none",
        "export=gguf_q4_k_m, or run=<run directory> to export its adapter",
    ),
    "best": (
        {"base": "b", "export": ExportConfig(gguf={"a": GgufTarget()}, merge_base=MergeBase.best)},
        "export.merge_base",
        "export.merge_base=best chooses what an adapter is merged into, and a base has no adapter",
        "leave export.merge_base out",
    ),
    "no rows": (
        {"base": "b", "option": "messages"},
        "data.train_file",
        "there are no training rows",
        "data.train_file=<a file of rows>",
    ),
    "missing rows": (
        {"base": "b", "data": DataConfig(train_file="nofile.jsonl", max_tokens=AUTO)},
        "data.train_file",
        "no such file: nofile.jsonl",
        "data.train_file=<a file of rows>",
    ),
    "out of a run": ({"out": "x"}, "out", "out belongs to base=<folder>; a run has its own folder", "out=null"),
    "revision of a run": (
        {"run": "r", "revision": "x"},
        "revision",
        "revision belongs to base=<folder>; a run has its own base",
        "revision=null",
    ),
    "data of a run": (
        {"data": DataConfig(train_file="rows.jsonl", max_tokens=AUTO)},
        "data",
        "data belongs to base=<folder>; a run has rows of its own, and takes data.eval_file alone",
        "leave data out, or base=<folder> instead of run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_go_together(case):
    fields, path, what, fix = CASES[case]
    assert found(**fields) == {path: (what, fix)}


def test_a_run_may_be_given_held_out_rows_later(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    file = str(tmp_path / "rows.jsonl")
    assert found(run="r", data=DataConfig(max_tokens=AUTO, eval_file=file, eval_rows=5)) == {}
    assert check_evaluated(EvalRecipe(run="r", data=LaterRows(file, 5))) == []
    for eval_file, eval_rows, path, what in (
        ("none.jsonl", None, "data.eval_file", "no such file: none.jsonl"),
        (None, 5, "data.eval_rows", "data.eval_rows counts rows of data.eval_file, which is not set"),
    ):
        data = DataConfig(max_tokens=AUTO, eval_file=eval_file, eval_rows=eval_rows)
        assert found(run="r", data=data)[path][0] == what
        (issue,) = check_evaluated(EvalRecipe(data=LaterRows(eval_file, eval_rows)))
        assert (issue.path, issue.what) == (path, what)
    (issue,) = check_evaluated(EvalRecipe(base="b", data=LaterRows(file)))
    assert issue.what == "data belongs to run=<run directory>; files of a base are scored on the rows of their export"


@pytest.mark.slow
def test_the_lines_that_give_rows_later_compose():
    recipe = compose_recipe("eval", ["run=r", "data.eval_file=rows.jsonl", "data.eval_rows=5"]).recipe
    assert recipe.data == LaterRows("rows.jsonl", 5)
    export = compose_recipe("export", ["run=r", "export=merged_16bit", "data.eval_file=rows.jsonl"]).recipe
    assert export.data == DataConfig(max_tokens=AUTO, eval_file="rows.jsonl")
