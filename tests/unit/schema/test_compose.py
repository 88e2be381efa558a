"""What is said of a line that names no option, or misspells one."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.compose import compose_recipe


def told(verb, *words):
    with pytest.raises(RecipeError) as caught:
        compose_recipe(verb, list(words))
    return [(problem.what, problem.where, problem.fix) for problem in caught.value.problems]


def test_where_no_format_is_chosen_the_common_one_is_proposed():
    ((what, where, fix),) = told("export", "run=latest")
    assert what.startswith("no export is chosen; there are adapter_gguf, ")
    assert (where, fix) == ("the command line", "export=gguf_q4_k_m")


def test_a_misspelt_format_is_told_once_with_the_list_of_formats():
    ((what, where, fix),) = told("export", "run=latest", "export=gguf_q8_x")
    first, known = what.split("\n")
    assert first == "there is no export named 'gguf_q8_x'; did you mean 'gguf_q8_0'?"
    assert known.startswith("  known    adapter_gguf, ")
    assert (where, fix) == ("command line: export=gguf_q8_x", "export=gguf_q8_0")


def test_a_format_that_resembles_none():
    ((what, _, fix),) = told("export", "run=latest", "export=zzz")
    assert what.startswith("there is no export named 'zzz'\n")
    assert fix == "export=gguf_q4_k_m"


def test_every_misspelt_format_of_a_list_is_told_and_the_rest_is_kept():
    ((what, _, fix),) = told("export", "run=latest", "export=[gguf_q8_x,merged_16bit,awq_4bt]")
    assert what.startswith(
        "there is no export named 'gguf_q8_x' and 'awq_4bt'; did you mean 'gguf_q8_0' and 'awq_4bit'?"
    )
    assert fix == "export=[gguf_q8_0,merged_16bit,awq_4bit]"


def test_a_misspelt_option_does_not_hide_that_another_group_has_none():
    first, second = told("train", "model=demo", "quant=nf5")
    assert first[2] == "quant=nf4"
    assert second[0].startswith("no data is chosen")
