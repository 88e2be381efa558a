"""Keys and values of earlier releases go on working: on the line, in recipe files, in the recipes of older runs."""

from pathlib import Path

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema import renamed
from qlora_kit.schema.compose import (
    compose_recipe,
    compose_unchecked,
    load_recipe,
    recipe_yaml,
    sweep_jobs,
    sweep_lines,
)
from qlora_kit.schema.renamed import RENAMED, todays_override
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.walk import find_path

GLOSSARY = Path(__file__).parents[3] / "docs" / "glossary.md"
LINE = ["model=demo", "data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64"]
INVERTED = "optim.strict is called optim.fallback now; optim.strict=true was read as optim.fallback=false"


@pytest.fixture(autouse=True)
def nothing_told_yet():
    renamed.tell_renamed.cache_clear()


def mine(tmp_path, monkeypatch, text, group="experiment"):
    folder = tmp_path / "recipes" / group
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "services"), [("mlflow", ["mlflow"]), ("jsonl", [])])
def test_the_one_service_of_an_older_run(tmp_path, name, services):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{source: demo}}\ndata: {{max_tokens: 64}}\ntracker: {{name: {name}, mode: offline, project: mine}}\n"
    )
    tracker = load_recipe("train", path).tracker
    assert tracker.services == services
    assert (tracker.mode.value, tracker.project) == ("offline", "mine")


def test_a_renamed_key_stays_in_its_group_and_hides_no_field():
    for old, today in RENAMED.items():
        assert old.rpartition(".")[0] == today.key.rpartition(".")[0]
        assert any(find_path(root, today.key) for root in RECIPE_OF_VERB.values())
        if old != today.key:
            assert not any(find_path(root, old) for root in RECIPE_OF_VERB.values())


def test_the_glossary_names_every_key_that_was_renamed():
    rows = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for old, today in RENAMED.items():
        assert [row for row in rows if row.startswith(f"| `{old}") and f"| `{today.key}" in row], old


@pytest.mark.parametrize(
    ("typed", "today"),
    [
        ("optim.strict=true", "optim.fallback=false"),
        ("optim.strict=False", "optim.fallback=true"),
        ("+optim.strict=1", "+optim.fallback=false"),
        ("++optim.strict=off", "++optim.fallback=true"),
        ("optim.strict=true,false", "optim.fallback=false,true"),
        ("optim.strict=choice(true, false)", "optim.fallback=choice(false, true)"),
        ("~optim.strict", "~optim.fallback"),
        ("hydra.sweeper.params.optim.strict=true,false", "hydra.sweeper.params.optim.fallback=false,true"),
        ("data.on_long_row=cut_end", "data.overflow=truncate_end"),
        ("data.on_long_row=drop,cut_prompt", "data.overflow=drop,truncate_prompt"),
        ("engine.weight_copies=6.4GB", "engine.cached_weights=6.4GB"),
        ("eval.stop_prompts=4", "eval.eos_rows=4"),
        ("export.calibration_general=0.2", "export.general_text_share=0.2"),
        ("export.merge_base=measure", "export.merge_base=best"),
        ("export.merge_base=original", "export.merge_base=original"),
        ("trainer=smoke", "trainer=smoke_test"),
        ("trainer=cpu", "trainer=cpu"),
        ("data.train_file=cut_end", "data.train_file=cut_end"),
    ],
)
def test_an_override_as_it_is_written_today(typed, today):
    assert todays_override(typed) == today


@pytest.mark.parametrize(
    ("verb", "typed", "line"),
    [
        ("train", "optim.strict=true", INVERTED),
        ("train", "++optim.strict=true", INVERTED),
        ("train", "trainer=smoke", "trainer=smoke is called trainer=smoke_test now"),
        (
            "train",
            "engine.weight_copies=none",
            "engine.weight_copies is called engine.cached_weights now; "
            "engine.weight_copies=none was read as engine.cached_weights=none",
        ),
        ("export", "export.merge_base=measure", "export.merge_base=measure is called export.merge_base=best now"),
    ],
)
def test_a_line_of_an_earlier_release_composes_and_is_told_once(verb, typed, line, capsys):
    line_before = LINE if verb == "train" else ["run=latest", "export=merged_16bit"]
    recipe = recipe_yaml(compose_unchecked(verb, [*line_before, todays_override(typed)]))
    assert capsys.readouterr().err == ""
    assert recipe_yaml(compose_unchecked(verb, [*line_before, typed])) == recipe
    compose_unchecked(verb, [*line_before, typed])
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_wrong_value_under_an_earlier_name_is_shown_as_it_was_typed():
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "optim.strict=maybe"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (
        "optim.fallback cannot be 'maybe': it is bool",
        "command line: optim.strict=maybe",
        "optim.fallback=true",
    )


def test_the_values_of_a_sweep():
    lines = ["optim.strict=true,false", "data.on_long_row=cut_end,drop"]
    jobs = sweep_jobs(lines)
    assert jobs == [
        [f"optim.fallback={fallback}", f"data.overflow={overflow}"]
        for fallback in ("False", "True")
        for overflow in ("truncate_end", "drop")
    ]
    assert sweep_lines(lines) == ["optim.fallback=false,true", "data.overflow=truncate_end,drop"]


def test_both_names_on_one_line_are_refused():
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "++optim.strict=true", "optim.fallback=true"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (
        "optim.fallback and optim.strict are both given; optim.strict is what optim.fallback was called before",
        "command line: ++optim.strict=true",
        "leave out optim.strict",
    )


FILE = """# @package _global_
# Größe, 大小: letters of several bytes before what is replaced
defaults:
  - override /trainer: smoke
optim:
  strict: {strict}  # said so
data: {{'on_long_row': "cut_prompt"}}
engine:
  weight_copies:
    6GB
"""


def test_a_file_of_an_earlier_release(tmp_path, monkeypatch, capsys):
    mine(tmp_path, monkeypatch, FILE.format(strict="yes"))
    composed = compose_recipe_of_rows(tmp_path, "experiment=mine", "optim.name=adamw")
    recipe = composed.recipe
    assert (recipe.trainer.max_steps, recipe.optim.fallback) == (5, False)
    assert (recipe.data.overflow.name, recipe.engine.cached_weights) == ("truncate_prompt", "6GB")
    assert capsys.readouterr().err.splitlines() == [
        "recipes/experiment/mine.yaml:4: trainer=smoke is called trainer=smoke_test now",
        "recipes/experiment/mine.yaml:6: optim.strict is called optim.fallback now; "
        "optim.strict=yes was read as optim.fallback=false",
        "recipes/experiment/mine.yaml:7: data.on_long_row is called data.overflow now; "
        "data.on_long_row=cut_prompt was read as data.overflow=truncate_prompt",
        "recipes/experiment/mine.yaml:9: engine.weight_copies is called engine.cached_weights now; "
        "engine.weight_copies=6GB was read as engine.cached_weights=6GB",
    ]
    assert composed.origins["data.overflow"].endswith("recipes/experiment/mine.yaml")


def compose_recipe_of_rows(tmp_path, *words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n', encoding="utf-8")
    return compose_recipe("train", [*LINE[:2], f"data.train_file={rows}", LINE[3], *words])


def test_a_mistake_in_a_file_of_an_earlier_release_keeps_its_line(tmp_path, monkeypatch):
    mine(tmp_path, monkeypatch, FILE.format(strict="maybe"))
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "experiment=mine"])
    (problem,) = caught.value.problems
    assert problem.what == "optim.fallback cannot be 'maybe': it is bool"
    assert problem.where == "recipes/experiment/mine.yaml:6"


@pytest.mark.parametrize("text", ["strict: true\nfallback: true\n", "fallback: true\nstrict: true\n"])
def test_a_file_with_both_names_is_refused(tmp_path, monkeypatch, text):
    mine(tmp_path, monkeypatch, text, group="optim")
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "optim=mine"])
    (problem,) = caught.value.problems
    assert problem.what == (
        "recipes/optim/mine.yaml gives optim.fallback and optim.strict, which is what optim.fallback was called before"
    )
    line = text.splitlines().index("strict: true") + 1
    assert (problem.where, problem.fix) == (f"recipes/optim/mine.yaml:{line}", "leave out strict")


def test_aliases_and_merges_of_a_file_of_an_earlier_release(tmp_path, monkeypatch):
    text = """# @package _global_
data: {cache: &yes true}
quant: {double_quant: *yes}
optim: {<<: {strict: *yes, beta1: 0.8}, beta2: 0.9}
"""
    mine(tmp_path, monkeypatch, text)
    recipe = compose_unchecked("train", [*LINE, "experiment=mine"])
    assert (recipe.optim.fallback, recipe.optim.beta1, recipe.optim.beta2) == (False, 0.8, 0.9)
    assert recipe.data.cache and recipe.quant.double_quant


def test_an_anchor_on_a_value_that_was_renamed_is_refused(tmp_path, monkeypatch):
    mine(tmp_path, monkeypatch, "# @package _global_\noptim: {strict: &yes true}\nquant: {double_quant: *yes}\n")
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "experiment=mine"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (
        "recipes/experiment/mine.yaml has an anchor on optim.strict, which is called optim.fallback now",
        "recipes/experiment/mine.yaml:2",
        "fallback: false",
    )


def test_an_alias_that_cannot_be_written_anew_is_refused(tmp_path, monkeypatch):
    text = "# @package _global_\ndata: {cache: &yes true}\noptim:\n  strict: # said so\n    *yes\n"
    mine(tmp_path, monkeypatch, text)
    with pytest.raises(RecipeError, match=r"has an alias that is not behind optim\.strict") as caught:
        compose_unchecked("train", [*LINE, "experiment=mine"])
    (problem,) = caught.value.problems
    assert (problem.where, problem.fix) == ("recipes/experiment/mine.yaml:4", "fallback: false")


@pytest.mark.parametrize("value", ["${debug}", "2", "-1", "01", "range(0,2)", "range(0,1)", "???"])
def test_a_value_whose_opposite_cannot_be_told_is_refused(tmp_path, monkeypatch, value):
    what = f"optim.strict is called optim.fallback now and means the opposite, which of '{value}' cannot be told"
    fix = "optim.fallback=false"
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, f"optim.strict={value}"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (what, f"command line: optim.strict={value}", fix)
    mine(tmp_path, monkeypatch, FILE.format(strict=value))
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, "experiment=mine"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (what, "recipes/experiment/mine.yaml:6", fix)


def test_a_sweep_in_a_file_of_an_earlier_release(tmp_path, monkeypatch, capsys):
    mine(tmp_path, monkeypatch, "# @package _global_\nhydra: {sweeper: {params: {optim.strict: 'true,false'}}}\n")
    compose_unchecked("train", [*LINE, "experiment=mine"])
    assert "optim.strict=true,false was read as optim.fallback=false,true" in capsys.readouterr().err


def test_a_users_own_option_keeps_its_name(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "recipes" / "trainer"
    folder.mkdir(parents=True)
    (folder / "smoke.yaml").write_text("max_steps: 7\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert compose_unchecked("train", [*LINE, "trainer=smoke"]).trainer.max_steps == 7
    assert capsys.readouterr().err == ""


def test_the_recipe_of_an_older_run(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {source: demo}\ndata: {max_tokens: 64, on_long_row: cut_end}\n"
        "optim: {strict: true}\nengine: {weight_copies: none}\n"
    )
    recipe = load_recipe("train", path)
    assert (recipe.data.overflow.name, recipe.optim.fallback) == ("truncate_end", False)
    assert recipe.engine.cached_weights == "none"
    path = tmp_path / "export.yaml"
    path.write_text("run: x\ndata: {max_tokens: auto}\nexport: {merge_base: measure, calibration_general: 0.3}\n")
    export = load_recipe("export", path).export
    assert (export.merge_base.name, export.general_text_share) == ("best", 0.3)
    assert capsys.readouterr().err == ""
