"""A value that a field cannot hold is answered with the nearest that it can."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.compose import compose_recipe

LINE = ["model=demo", "data=messages", "data.train_file=rows.jsonl", "data.max_tokens=64"]


def problems(*more):
    with pytest.raises(RecipeError) as caught:
        compose_recipe("train", [*LINE, *more])
    return caught.value.problems


@pytest.mark.parametrize(
    ("given", "fix"),
    [("data.batching=paked", "data.batching=packed"), ("engine.compute=fp8_back", "engine.compute=fp8_backward")],
)
def test_a_misspelled_choice_is_answered_with_the_nearest(given, fix):
    (problem,) = problems(given)
    assert problem.where == f"command line: {given}"
    assert problem.fix == fix
    assert "it is one of" in problem.what


@pytest.mark.slow
def test_a_choice_like_no_other_and_a_wrong_type_are_answered_with_the_value_that_holds():
    first, second = problems("data.batching=xyz", "lora.r=many")
    assert first.fix == "data.batching=padded"
    assert (second.fix, second.what) == ("lora.r=16", "lora.r cannot be 'many': it is int")


@pytest.mark.parametrize(
    ("given", "fix"),
    [("exports=awq_4bit", "'exports=[awq_4bit]'"), ("lora.targets=attention", "'lora.targets=[attention]'")],
)
def test_a_word_where_a_list_stands_is_put_in_brackets(given, fix):
    (problem,) = problems(given)
    assert problem.fix == fix
