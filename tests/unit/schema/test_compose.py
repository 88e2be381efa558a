"""What is said of a line that names no option, or misspells one."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.compose import compose_recipe, compose_unchecked


def told(verb, *words):
    with pytest.raises(RecipeError) as caught:
        compose_recipe(verb, list(words))
    return [(problem.what, problem.where, problem.fix) for problem in caught.value.problems]


def test_where_no_format_is_chosen_the_common_one_is_proposed():
    ((what, where, fix),) = told("export", "run=latest")
    assert what.startswith("no export is chosen; there are adapter_gguf, ")
    assert (where, fix) == ("the command line", "export=gguf_q4_k_m")


def test_a_misspelled_format_is_told_once_with_the_list_of_formats():
    ((what, where, fix),) = told("export", "run=latest", "export=gguf_q8_x")
    first, known = what.split("\n")
    assert first == "there is no export named 'gguf_q8_x'; did you mean 'gguf_q8_0'?"
    assert known.startswith("  known    adapter_gguf, ")
    assert (where, fix) == ("command line: export=gguf_q8_x", "export=gguf_q8_0")


def test_a_format_that_resembles_none():
    ((what, _, fix),) = told("export", "run=latest", "export=zzz")
    assert what.startswith("there is no export named 'zzz'\n")
    assert fix == "export=gguf_q4_k_m"


def test_every_misspelled_format_of_a_list_is_told_and_the_rest_is_kept():
    ((what, _, fix),) = told("export", "run=latest", "export=[gguf_q8_x,merged_16bit,awq_4bt]")
    assert what.startswith(
        "there is no export named 'gguf_q8_x' and 'awq_4bt'; did you mean 'gguf_q8_0' and 'awq_4bit'?"
    )
    assert fix == "export=[gguf_q8_0,merged_16bit,awq_4bit]"


def test_a_misspelled_option_does_not_hide_that_another_group_has_none():
    first, second = told("train", "model=demo", "quant=nf5")
    assert first[2] == "quant=nf4"
    assert second[0].startswith("no data is chosen")


DATA = ("data=messages", "data.train_file=rows.jsonl", "data.max_tokens=64")


@pytest.mark.slow
def test_a_model_of_ones_own_is_its_source_alone(tmp_path):
    recipe = compose_unchecked("train", [f"model.source={tmp_path}", *DATA])
    assert recipe.model.source == str(tmp_path)
    assert recipe.model.shape is None and recipe.model.revision is None
    named = compose_unchecked("train", ["model=qwen3_4b", f"model.source={tmp_path}", *DATA])
    assert named.model.source == str(tmp_path)
    assert named.model.shape is not None and named.model.shape.num_layers == 36


def test_a_wrong_value_beside_a_model_of_ones_own(tmp_path):
    assert told("train", f"model.source={tmp_path}", "lora.r=abc", *DATA) == [
        ("lora.r cannot be 'abc': it is int", "command line: lora.r=abc", "lora.r=16")
    ]


def test_no_model_at_all():
    ((what, _, fix),) = told("train", *DATA)
    assert what.startswith("no model is chosen; there are demo, ")
    assert what.endswith("; one of your own is model.source=<a folder or hub id>") and fix == "model=demo"


def test_a_misspelled_field_of_a_group_without_an_option_is_all_that_is_told():
    assert told("train", "model.sorce=here", *DATA) == [
        (
            "there is no field 'model.sorce'; did you mean 'model.source'?",
            "command line: model.sorce=here",
            "model.source=here",
        )
    ]


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("card=24GB", "'card' is a word of qlora-kit plan, and no field of a recipe"),
        ("crad=24GB", "there is no field 'crad'; did you mean 'card', a word of qlora-kit plan?"),
    ],
)
def test_a_word_of_plan_alone_is_known(word, what):
    assert told("train", "model=demo", word, *DATA) == [(what, f"command line: {word}", "qlora-kit plan --help")]


@pytest.mark.slow
def test_of_fields_with_one_name_the_nearest_to_the_root_is_meant():
    ((what, _, fix),) = told("train", "model=demo", "run.name=mine", *DATA)
    assert what == "there is no field 'run.name'; did you mean 'name'?" and fix == "name=mine"


def test_a_file_may_look_up_a_field_that_another_file_sets(tmp_path, monkeypatch):
    experiment = tmp_path / "recipes" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nlora:\n  alpha: ${trainer.seed}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    composed = compose_recipe("train", ["experiment=mine", "model=demo", *DATA[:1], *_rows(tmp_path), "trainer.seed=7"])
    assert composed.recipe.lora.alpha == 7
    assert composed.origins["lora.alpha"].endswith("recipes/experiment/mine.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["mine", "yours"])
def test_a_file_that_builds_on_itself(tmp_path, monkeypatch, other):
    folder = tmp_path / "recipes" / "experiment"
    folder.mkdir(parents=True)
    (folder / f"{other}.yaml").write_text("# @package _global_\ndefaults:\n  - mine\n", encoding="utf-8")
    (folder / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - {other}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ((what, where, _),) = told("train", "experiment=mine", *DATA)
    assert (what, where) == ("a chosen recipe file builds on itself, or on another that builds on it", "its defaults")


def _rows(folder):
    rows = folder / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return f"data.train_file={rows}", "data.max_tokens=64"
