"""A base that changed under a run is refused by name."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import RecipeError
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.same_base import note_base, refuse_other_base
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "base"
    build_tiny_model("llama", folder)
    return folder


@pytest.fixture
def base(made, tmp_path):
    return shutil.copytree(made, tmp_path / "base")


@pytest.fixture
def run(base, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text("{}")
    note_base(run, base)
    return run


def change_numbers(base, number=slice(None)):
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name].view(-1)[number] += 0.01
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def change_settings(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def refused(run, base, *, is_trained):
    with pytest.raises(RecipeError, match="changed since the run was") as caught:
        refuse_other_base(run, base, is_trained=is_trained)
    return str(caught.value)


@pytest.mark.parametrize("is_trained", [True, False])
def test_other_numbers_or_settings_are_another_base(run, base, is_trained):
    refuse_other_base(run, base, is_trained=is_trained)
    change_numbers(base)
    assert refused(run, base, is_trained=is_trained).startswith("model.safetensors of the base")
    change_settings(base)
    assert refused(run, base, is_trained=is_trained).startswith("config.json, model.safetensors of the base")


@pytest.mark.parametrize("number", [0, -1])
def test_the_ends_of_every_tensor_are_looked_at(run, base, number):
    change_numbers(base, number)
    assert "model.safetensors" in refused(run, base, is_trained=True)


def test_a_file_that_is_gone_is_a_change(run, base):
    (base / "model.safetensors").unlink()
    assert "model.safetensors" in refused(run, base, is_trained=True)


def test_a_trained_run_has_a_tokenizer_of_its_own(run, base):
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert refused(run, base, is_trained=False).startswith("chat_template.jinja of the base")
    refuse_other_base(run, base, is_trained=True)


def test_what_cannot_be_compared_is_told(run, base, capsys):
    run.base.write_text("[")
    refuse_other_base(run, base, is_trained=True)
    assert f"{run.base} is damaged, so nothing tells whether {base} is still" in capsys.readouterr().err
    run.base.unlink()
    refuse_other_base(run, base, is_trained=False)  # a job of a sweep, which has its recipe before it begins
    assert capsys.readouterr().err == ""
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    refuse_other_base(run, base, is_trained=False)
    assert f"{run.path} does not say what its base was" in capsys.readouterr().err
