"""Talking to a transformers model: pieces as they come, and an error instead of waiting for ever."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.cli.chat import run as chat_verb
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import write_json
from qlora_kit.formats.registry import find_format
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.pipelines.chat import _export_speaker, _torch_speaker, chat
from tests.tiny_models import build_tiny_model

MESSAGES = [{"role": "user", "content": "turn on the lamp"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("chat") / "base")


@pytest.mark.timeout(60)
def test_a_failure_of_the_model_ends_the_answer(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(_torch_speaker(model, load_tokenizer(folder))(MESSAGES, 4))


def test_pieces_make_the_answer_of_generate(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    pieces = list(_torch_speaker(model, tokenizer)(MESSAGES, 6))
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", "{{ raise_exception('no') }}", None])
def test_a_template_that_cannot_be_rendered_ends_in_an_error_by_name(folder, template):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="chat template"):
        list(_torch_speaker(model, tokenizer)(MESSAGES, 4))


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (
            {"verdict": "rejected", "faults": ["mean KL 4.4"]},
            "warning: this file is rejected, do not serve it: mean KL 4.4",
        ),
        ({"rejected": True}, "warning: this file is rejected, do not serve it: its manifest.json does not say why"),
        ({"verdict": "not measured"}, "warning: this file was not measured, so nothing tells how close it is to what"),
        ({"verdict": "accepted"}, ""),
        ({"verdict": "measured"}, ""),
    ],
)
def test_a_file_that_should_not_be_served_is_called_so_before_it_answers(tmp_path, monkeypatch, capsys, manifest, said):
    write_json(tmp_path / "manifest.json", {"format": "merged", "file": ".", **manifest})
    told = []

    def speaker(format_name, path):
        told.append(capsys.readouterr().err)
        return lambda messages, most: iter(["an answer"])

    monkeypatch.setattr("qlora_kit.pipelines.chat._export_speaker", speaker)
    chat(str(tmp_path), "hello", 4)
    assert told[0].startswith(said) and bool(told[0]) == bool(said)
    assert capsys.readouterr().out == "an answer\n"


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["latest", "gguf_q4_k_m"], "qlora-kit chat outputs/a/1/exports/gguf_q4_k_m"),
        (["outputs/a/1", "gguf_q4_k_m"], "qlora-kit chat outputs/a/1/exports/gguf_q4_k_m"),
        (["run=latest", "gguf_q4_k_m"], "qlora-kit chat outputs/a/1/exports/gguf_q4_k_m"),
        (["latest", "hello"], "qlora-kit chat latest --message hello"),
        (["run=latest", "hello"], "qlora-kit chat latest --message hello"),
        (["latest", "turn", "on", "it"], "qlora-kit chat latest --message 'turn on it'"),
        (["latest", "--max-new-tokens", "many"], "qlora-kit chat --help"),
        (["latest", "--max-new-tokens", "0"], "--max-new-tokens 256"),
        (["--model", "x"], "qlora-kit chat --help"),
    ],
)
def test_a_line_that_chat_does_not_take_is_told_with_the_one_that_it_does(tmp_path, monkeypatch, words, fix):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "outputs/a/1/exports/gguf_q4_k_m"
    file.mkdir(parents=True)
    (tmp_path / "outputs/a/1/recipe.yaml").write_text("{}")
    write_json(file / "manifest.json", {})
    with pytest.raises(RecipeError) as caught:
        chat_verb(words)
    (problem,) = caught.value.problems
    assert (problem.where, problem.fix) == ("the command line", fix)


def test_what_is_loaded_is_said_before_the_silence(folder, capsys):
    _export_speaker(find_format("merged"), folder)
    assert capsys.readouterr().err.startswith(f"loading {folder}\n")


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("run=latest", "latest"),
        ("run=outputs/a/1", "outputs/a/1"),
        ("run='it\\'s'", "it's"),
        ("outputs/a/1", "outputs/a/1"),
        ("run=here", "run=here"),
    ],
)
def test_a_run_may_be_named_as_for_other_verbs(tmp_path, monkeypatch, word, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=here").mkdir()
    asked = []
    monkeypatch.setattr("qlora_kit.pipelines.chat.chat", lambda *words: asked.append(words))
    assert chat_verb([word, "--message", "a"]) == 0
    assert asked == [(place, "a", 256)]


def test_run_of_nothing_is_refused():
    with pytest.raises(RecipeError, match="run= names nothing"):
        chat_verb(["run="])


def test_what_is_no_place_is_told_with_the_run_that_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for job in "10":
        run = tmp_path / "outputs/a/sweep_1" / job
        (run / "adapter").mkdir(parents=True)
        write_json(run / "result.json", {})
        write_json(run / "recipe.yaml", {})
    write_json(run.parent / "sweep.json", {"rows": [{"objective": 0.1, "folder": "1"}]})
    for place, fix in (("outputs/a/sweep_1", "outputs/a/sweep_1/1"), ("outputs/b", "latest")):
        with pytest.raises(RecipeError, match="is neither a run directory nor an export") as caught:
            chat(place, "a", 4)
        assert caught.value.problems[0].fix == f"qlora-kit chat {fix}"
