"""What a run is exported as where the line names no export."""

from pathlib import Path

import pytest

from qlora_kit.core.files import write_text
from qlora_kit.runs.wished import with_wished_exports
from qlora_kit.schema.compose import compose_recipe, recipe_yaml
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import ExportRecipe, TrainRecipe


def trained_as(exports: list[str]) -> str:
    """The recipe of a run."""
    data = DataConfig(train_file="rows.jsonl", max_tokens=64)
    return recipe_yaml(TrainRecipe(model=ModelConfig(source="demo"), data=data, exports=exports))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose recipe names two exports, with a name that a line has to quote."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/it's mine/2026-01-31_12-00-00")
    write_text(folder / "recipe.yaml", trained_as(["gguf_q8_0", "merged_16bit"]))
    write_text(folder / "result.json", "{}")
    write_text(folder / "adapter" / "adapter_config.json", "{}")
    return folder


@pytest.mark.parametrize("line", [[], ["run=latest"], ["export.max_mean_kl=0.1"]])
def test_a_line_without_exports_writes_those_of_the_recipe(run: Path, line: list[str]) -> None:
    name = "latest" if "run=latest" in line else None
    recipe = compose_recipe("export", with_wished_exports(line, name)).recipe
    assert isinstance(recipe, ExportRecipe)
    assert recipe.run == str(run)
    assert [one.name for one in recipe.export.targets()] == ["gguf_q8_0", "merged_16bit"]
    assert recipe.export.max_mean_kl == (0.1 if "export.max_mean_kl=0.1" in line else None)


@pytest.mark.parametrize(("line", "name"), [(["export=awq_4bit"], None), (["base=demo"], None), (["run=gone"], "gone")])
def test_a_line_that_names_its_exports_or_no_run_stays_as_it_is(run: Path, line: list[str], name: str | None) -> None:
    assert with_wished_exports(line, name) == line


def test_a_recipe_that_names_none_adds_none(run: Path) -> None:
    write_text(run / "recipe.yaml", trained_as([]))
    assert with_wished_exports(["run=latest"], "latest") == ["run=latest"]
