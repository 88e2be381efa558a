"""The look verbs over recipes: list, show, diff, copy, and every shipped experiment composes."""

import re
from dataclasses import asdict, is_dataclass
from enum import Enum

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.cli.verbs import main
from qlora_kit.schema.check_wished import UNCHECKED
from qlora_kit.schema.compose import compose_unchecked
from qlora_kit.schema.folders import groups, packaged_recipes
from qlora_kit.schema.root import TrainRecipe

pytestmark = pytest.mark.slow


def packaged_text(group, option):
    return (packaged_recipes() / group / f"{option}.yaml").read_text(encoding="utf-8")


def assert_set(part, stated):
    """What a file states, read by PyYAML alone, is what the composed part of a recipe has."""
    part = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
    for name, value in stated.items():
        if isinstance(value, dict):
            assert_set(part[name], value)
        else:
            found = part[name].name if isinstance(part[name], Enum) else part[name]
            assert found == value and type(found) is type(value), name


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes(experiment):
    recipe = compose_unchecked("train", [f"experiment={experiment}", "data.train_file=rows.jsonl"])
    assert isinstance(recipe, TrainRecipe)
    assert recipe.model.source


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in ("quant", "lora", "optim", "trainer", "engine", "tracker", "sweep")
        for option in groups()[group]
    ],
)
def test_every_option_sets_what_its_file_states(group, option):
    recipe = compose_unchecked("train", ["model=demo", "data=home_commands", f"{group}={option}"])
    assert_set(getattr(recipe, group), yaml.safe_load(packaged_text(group, option)))


@pytest.mark.parametrize("option", groups()["export"])
def test_every_export_is_one_file_of_its_name_with_what_its_own_file_states(option):
    text = packaged_text("export", option)
    stated = re.search(r"@package export\.(\w+)\.(\w+)", text)
    assert stated is not None
    format_, name = stated.groups()
    export = compose_unchecked("export", [f"export={option}"]).export
    files = {kind: list(made) for kind, made in asdict(export).items() if made and isinstance(made, dict)}
    assert files == {format_: [name]}
    assert name == option
    assert_set(getattr(export, format_)[name], yaml.safe_load(text))


def test_list_names_every_group(capsys):
    assert main(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{group}\n" in shown for group in groups())


def test_list_shows_whole_sentences(capsys):
    assert main(["recipes", "list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == sum(map(len, groups().values()))
    assert not [line for line in lines if not line.endswith(".")]
    assert "  messages                             Your conversations, one {" in "\n".join(lines)
    assert not [line for line in lines if " Give data." in line]


@pytest.mark.parametrize("action", ["show", "validate"])
def test_a_name_as_copy_takes_it_is_told_with_its_override(capsys, action):
    for word in ("experiment/qwen3_8b_chat_24gb", "recipes/experiment/qwen3_8b_chat_24gb.yaml", "qwen3_8b_chat_24gb"):
        assert main(["recipes", action, word]) == 2
        assert "\n  fix      experiment=qwen3_8b_chat_24gb\n" in capsys.readouterr().err
    assert main(["recipes", action, "experiment/nothing"]) == 2
    assert "fix" not in capsys.readouterr().err


def test_list_of_an_unknown_group(capsys):
    assert main(["recipes", "list", "quants"]) == 2
    assert "there is no group 'quants'" in capsys.readouterr().err


def test_show_leaves_open_what_only_the_user_knows(capsys):
    assert main(["recipes", "show", "experiment=llama3_1_8b_chat_24gb"]) == 0
    assert "train_file: null" in capsys.readouterr().out


def test_validate_names_what_is_missing(capsys):
    assert main(["recipes", "validate", "experiment=llama3_1_8b_chat_24gb"]) == 2
    assert "there are no training rows" in capsys.readouterr().err


def test_validate_says_that_a_recipe_is_valid(capsys, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr("qlora_kit.training.preflight.check_train", lambda composed: composed.recipe)
    line = ["model=demo", "data=rows", f"data.train_file={tmp_path / 'rows.jsonl'}", "data.max_tokens=64"]
    assert main(["recipes", "validate", *line]) == 0
    assert capsys.readouterr().out == "valid\n"
    line[0] = "model=qwen3_0_6b"
    assert main(["recipes", "validate", *line, "exports=[gguf_q8_0]"]) == 0
    assert capsys.readouterr().out == f"valid\n{UNCHECKED}\n"


def test_diff_shows_what_differs(capsys):
    assert main(["recipes", "diff", "llama3_1_8b_chat_24gb", "qwen3_8b_chat_24gb"]) == 0
    shown = capsys.readouterr().out
    assert "-  source: meta-llama/Llama-3.1-8B-Instruct" in shown
    assert "+  source: Qwen/Qwen3-8B" in shown


def test_copy_makes_a_recipe_of_ones_own_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "experiment/qwen3_8b_chat_24gb", "mine"]) == 0
    assert (tmp_path / "recipes" / "experiment" / "mine.yaml").is_file()
    assert main(["recipes", "copy", "experiment/qwen3_8b_chat_24gb", "mine"]) == 2
    assert "exists already and is kept" in capsys.readouterr().err


def test_copy_of_an_unknown_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "experiment/qwen3_8b_chat_24g"]) == 2
    assert "qlora-kit recipes copy experiment/qwen3_8b_chat_24gb" in capsys.readouterr().err
