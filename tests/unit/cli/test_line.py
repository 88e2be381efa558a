"""Words of a command line that are no override."""

import shlex

import pytest

from qlora_kit.cli.line import parse_line
from qlora_kit.core.errors import RecipeError


def told(*words):
    with pytest.raises(RecipeError) as caught:
        parse_line(list(words))
    return [(problem.what, problem.fix) for problem in caught.value.problems]


def test_a_recipe_file_is_put_where_recipes_lie_and_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's mine.yaml").write_text("# @package _global_\n")
    ((what, fix),) = told("it's mine.yaml")
    assert what.startswith("'it's mine.yaml' is not an override; a recipe file lies in ./recipes/experiment")
    made, copied, trained = fix.split(" && ")
    assert shlex.split(made) == ["mkdir", "-p", "recipes/experiment"]
    assert shlex.split(copied) == ["cp", "it's mine.yaml", "recipes/experiment/"]
    assert shlex.split(trained) == ["qlora-kit", "train", "experiment=it's mine"]


def test_an_option_without_its_group_and_words_like_no_other_are_told_together():
    assert told("nf4", "quant/int8", "lora/int8", "zzz", "lora.r=3") == [
        ("'nf4' is not an override", "quant=nf4"),
        ("'quant/int8' is not an override", "quant=int8"),
        ("'lora/int8' is not an override", ""),
        ("'zzz' is not an override", ""),
    ]


@pytest.mark.parametrize("flag", ["--config-dir=/tmp", "-cd", "-sc", "--shell-completion", "--info", "--cfg"])
def test_flags_of_hydra_are_not_passed_on(flag):
    ((what, fix),) = told(flag)
    assert what == f"there is no flag '{flag}'; there are -h, --help, -m, --multirun"
    assert fix == ("qlora-kit recipes show" if flag == "--cfg" else "")
