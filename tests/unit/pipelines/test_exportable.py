"""A trained run as something to export."""

from pathlib import Path

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.rundir import RunDirectory
from qlora_kit.pipelines.exportable import TrainedRun
from qlora_kit.pipelines.opened_run import OpenedRun
from qlora_kit.schema.export import ExportConfig, MergeBase
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe

DEQUANTIZED, ORIGINAL, MEASURE = MergeBase.dequantized, MergeBase.original, MergeBase.measure


def run_of(kind):
    recipe = TrainRecipe(name="mine", model=ModelConfig(source="a/b", revision="c"), quant=QuantConfig(kind=kind))
    return TrainedRun.of(OpenedRun(RunDirectory(Path("run")), recipe, Path("base"), None))


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
        (QuantKind.nf4, MEASURE, [DEQUANTIZED, ORIGINAL]),
        (QuantKind.none, MEASURE, [ORIGINAL]),
    ],
)
def test_what_the_adapter_is_merged_into(kind, wanted, bases):
    assert run_of(kind).merge_bases(ExportConfig(merge_base=wanted), is_scored=True) == bases


def test_nothing_to_measure_on():
    with pytest.raises(RecipeError, match="this run has no held-out rows") as caught:
        run_of(QuantKind.nf4).merge_bases(ExportConfig(merge_base=MEASURE), is_scored=False)
    assert caught.value.problems[0].fix == "export.merge_base=dequantized"
