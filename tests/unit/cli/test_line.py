"""Words of a command line that are no override."""

import os
import shlex

import pytest

from qlora_kit.cli.line import parse_line
from qlora_kit.cli.report import run as report_verb
from qlora_kit.cli.verbs import main
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import write_json, write_text
from qlora_kit.core.shell import override, shell_line
from qlora_kit.runs.directory import RunDirectory


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


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A finished run, one that was begun, a sweep whose best job is not its newest, exports of a base, and a base."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["shop/b", "shop/a", "x/sweep_1/1", "x/sweep_1/0", "it's/a"]):
        run = RunDirectory(tmp_path / "outputs" / name)
        write_text(run.recipe, "")
        os.utime(run.recipe, (9 - age, 9 - age))
        if name != "shop/b":
            run.adapter.mkdir()
            write_json(run.result, {})
    rows = [{"objective": 0.1, "folder": "0"}, {"objective": 0.2, "folder": "1"}]
    write_json(tmp_path / "outputs/x/sweep_1/sweep.json", {"rows": rows})
    write_text(tmp_path / "outputs/base/1/export.yaml", "")
    write_text(tmp_path / "model/config.json", "{}")


@pytest.mark.parametrize(
    ("takes", "finished", "word", "fix"),
    [
        ("run", True, "latest", "run=latest"),
        ("run", True, "outputs/shop", "run=outputs/shop/a"),
        ("run", None, "outputs/shop", "run=outputs/shop/b"),
        ("run", True, "outputs/shop/a/", "run=outputs/shop/a"),
        ("run", True, "outputs/shop/b", "qlora-kit train resume=outputs/shop/b"),
        ("run", None, "outputs/shop/b", "run=outputs/shop/b"),
        ("run", True, "outputs/x/sweep_1", "run=outputs/x/sweep_1/0"),
        ("run", None, "outputs/x", "run=outputs/x/sweep_1/0"),
        ("run", True, "outputs/it's", shell_line([override("run", "outputs/it's/a")])),
        ("run", True, "outputs/base/1", "base=outputs/base/1"),
        ("run", None, "model", "base=model"),
        ("run", True, "outputs/nothing", ""),
        ("run", None, "outputs/nothing", "qlora-kit report --help"),
        ("run", True, "x" * 5000, ""),
        ("resume", False, "latest", "resume=latest"),
        ("resume", False, "outputs/shop", "resume=outputs/shop/b"),
        ("resume", False, "outputs/shop/a", ""),
        ("resume", False, "model", ""),
    ],
)
def test_a_run_that_is_named_without_its_key_is_told_with_it(outputs, takes, finished, word, fix):
    with pytest.raises(RecipeError) as caught:
        report_verb([word]) if finished is None else parse_line([word], takes)
    (problem,) = caught.value.problems
    assert problem.fix == fix


@pytest.mark.parametrize(("verb", "fix"), [("train", "resume"), ("export", "run"), ("eval", "run"), ("report", "run")])
def test_every_verb_that_takes_a_run_tells_its_key(outputs, capsys, verb, fix):
    assert main([verb, "latest"]) == 2
    assert f"\n  fix      {fix}=latest\n" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config-dir=/tmp", "-cd", "-sc", "--shell-completion", "--info", "--cfg"])
def test_flags_of_hydra_are_not_passed_on(flag):
    ((what, fix),) = told(flag)
    assert what == f"there is no flag '{flag}'; there are -h, --help, -m, --multirun, --quiet, --verbose"
    assert fix == ("qlora-kit recipes show" if flag == "--cfg" else "")
