"""Names under `exports` are options of the group export, once each; `export` itself belongs to another verb."""

import shlex

import pytest

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.schema.compose import compose_recipe, compose_unchecked
from qlora_kit.schema.root import TrainRecipe

LINE = ["model=demo", "data=home_commands", "data.train_file=rows.jsonl", "data.max_tokens=64"]


def told(*words: str, verb: str = "train") -> Problem:
    """The one problem of a line that is about its exports."""
    with pytest.raises(RecipeError) as caught:
        compose_recipe(verb, [*(LINE if verb == "train" else ["run=latest"]), *words])
    (found,) = (problem for problem in caught.value.problems if "export" in problem.what)
    return found


@pytest.mark.parametrize(
    ("wished", "what", "right"),
    [
        ("gguf_q4km", "'gguf_q4km', and there is no such export; did you mean 'gguf_q4_k_m'?", ["gguf_q4_k_m"]),
        ("xyz,awq_4bit", "exports names 'xyz', and there is no such export\n  known    adapter_gguf, ", ["awq_4bit"]),
        ("xyz", "exports names 'xyz', and there is no such export\n  known    adapter_gguf, ", ["gguf_q4_k_m"]),
        ("gptq4bit,awq4bit,w8a16", "names 'gptq4bit' and 'awq4bit', and", ["gptq_4bit", "awq_4bit", "w8a16"]),
        ("awq_4bit,awq_4bit", "exports names awq_4bit twice", ["awq_4bit"]),
    ],
)  # fmt: skip
def test_a_wrong_name_is_told_with_the_line_that_mends_it(wished: str, what: str, right: list[str]) -> None:
    problem = told(f"exports=[{wished}]")
    assert what in problem.what
    assert problem.where == f"command line: exports=[{wished}]"
    recipe = compose_unchecked("train", [*LINE, *shlex.split(problem.fix)])
    assert isinstance(recipe, TrainRecipe)
    assert recipe.exports == right


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("export=gguf_q4_k_m", "'exports=[gguf_q4_k_m]'"),
        ("export=[gguf_q4_k_m,awq_4bit]", "'exports=[gguf_q4_k_m,awq_4bit]'"),
    ],
)
def test_an_export_on_the_line_of_a_training_is_named_as_a_wish(word: str, fix: str) -> None:
    problem = told(word)
    assert "the train recipe has no export; export belongs to qlora-kit export" in problem.what
    assert (problem.where, problem.fix) == (f"command line: {word}", fix)


def test_another_group_of_another_verb_is_said_to_be_there() -> None:
    problem = told("lora=dora", "export=gguf_q4_k_m", verb="export")
    assert "the export recipe has no lora; lora belongs to qlora-kit train" in problem.what
    assert problem.fix == "qlora-kit export --help"
