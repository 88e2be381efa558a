"""A trained run as something to export."""

from pathlib import Path

import pytest

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.formats.merge_bases import merge_bases
from qlora_kit.pipelines.export import export, refuse_unmeasurable
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.export import BnbKind, BnbTarget, ExportConfig, GgufTarget, MergeBase
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe

DEQUANTIZED, ORIGINAL, BEST = MergeBase.dequantized, MergeBase.original, MergeBase.best


def run_of(kind, **data):
    model, quant = ModelConfig(source="a/b", revision="c"), QuantConfig(kind=kind)
    recipe = TrainRecipe(name="mine", model=model, quant=quant, data=DataConfig(**data))
    return Run(RunDirectory(Path("run")), recipe, Base.of(model, Path("base")), None)


def test_it_is_named_as_its_recipe_says():
    run = run_of(QuantKind.nf4)
    assert (run.name, run.kind, run.reference) == ("mine", "run", "the trained model")
    assert (run.base.source, run.base.revision, run.base.folder) == ("a/b", "c", Path("base"))
    assert run.trained == run.directory == RunDirectory(Path("run"))


@pytest.mark.parametrize(
    ("kind", "wanted", "bases"),
    [
        (QuantKind.nf4, DEQUANTIZED, [DEQUANTIZED]),
        (QuantKind.nf4, ORIGINAL, [ORIGINAL]),
        (QuantKind.nf4, BEST, [DEQUANTIZED, ORIGINAL]),
        (QuantKind.none, BEST, [ORIGINAL]),
    ],
)
def test_what_the_adapter_is_merged_into(kind, wanted, bases):
    assert merge_bases(run_of(kind), ExportConfig(merge_base=wanted)) == bases


BOTH = {"bnb": {"b": BnbTarget()}, "gguf": {"g": GgufTarget()}}


@pytest.mark.parametrize(
    ("trained", "targets", "bases"),
    [
        (QuantKind.nf4, {"gguf": {"g": GgufTarget()}}, [DEQUANTIZED]),
        (QuantKind.nf4, {"bnb": {"b": BnbTarget()}}, [ORIGINAL]),
        (QuantKind.nf4, BOTH, [DEQUANTIZED, ORIGINAL]),
        (QuantKind.nf4, {"bnb": {"b": BnbTarget(kind=BnbKind.int8)}}, [DEQUANTIZED]),
        (QuantKind.int8, {"bnb": {"b": BnbTarget(kind=BnbKind.int8)}}, [ORIGINAL]),
        (QuantKind.none, BOTH, [DEQUANTIZED]),
    ],
)
def test_a_file_in_the_format_of_the_training_base_is_made_from_the_original_one(trained, targets, bases):
    assert merge_bases(run_of(trained), ExportConfig(**targets)) == bases
    assert merge_bases(run_of(trained), ExportConfig(merge_base=DEQUANTIZED, **targets)) == [DEQUANTIZED]


def test_what_judges_by_held_out_rows_is_refused_where_there_are_none():
    run = run_of(QuantKind.nf4)
    refuse_unmeasurable(run, ExportConfig())
    with pytest.raises(RecipeError) as caught:
        refuse_unmeasurable(run, ExportConfig(merge_base=BEST, max_mean_kl=0.05))
    bound, best = caught.value.problems
    assert bound.what.startswith("export.max_mean_kl=0.05 is a bound on what is measured, and this run has no held-out")
    assert best.what.startswith("export.merge_base=best compares held-out losses, and this run has no held-out")
    assert (bound.where, best.where) == ("export.max_mean_kl", "export.merge_base")
    assert bound.fix == best.fix == "data.eval_file=<rows that were not trained on>"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("held_out", "problems"),
    [({}, 2), ({"eval_share": 0.02}, 0), ({"eval_rows": 4}, 0), ({"eval_file": "rows.jsonl"}, 0)],
)
def test_a_run_with_held_out_rows_may_have_a_bound(held_out, problems):
    found: tuple[Problem, ...] = ()
    try:
        refuse_unmeasurable(run_of(QuantKind.nf4, **held_out), ExportConfig(merge_base=BEST, max_mean_kl=0.05))
    except RecipeError as error:
        found = error.problems
    assert len(found) == problems


def test_a_bound_without_rows_is_refused_before_any_row_is_read(monkeypatch):
    monkeypatch.setattr(Run, "rows", lambda _: pytest.fail("read"))
    with pytest.raises(RecipeError, match="is a bound on what is measured"):
        export(run_of(QuantKind.nf4), ExportConfig(max_mean_kl=0.05))
