"""The command line: quick help, nothing heavy imported, exit codes, one message a mistake."""

import resource
import subprocess
import sys

import pytest

from qlora_kit.cli.verbs import VERBS, main
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.walk import schema_paths

pytestmark = pytest.mark.slow

RUN_VERBS = ["train", "export", "eval"]


def kit(*words: str, cwd: object = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_kit", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)  # type: ignore[call-overload]


def children_seconds():
    """Processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("words", [[], *[[verb] for verb in VERBS]], ids=lambda words: words[0] if words else "top")
def test_help_is_quick(words):
    seconds = []
    for _ in range(3):
        began = children_seconds()
        done = kit(*words, "--help")
        seconds.append(children_seconds() - began)
        assert done.returncode == 0
        assert "usage: qlora-kit" in done.stdout
    assert min(seconds) < 0.4  # of processor time, which other work on the machine leaves alone


@pytest.mark.parametrize(
    "line",
    [
        ["--help"],
        ["train", "--help"],
        ["recipes", "list"],
        ["recipes", "show", "model=demo", "data=home_commands", "data.train_file=README.md", "data.eval_file=null"],
        ["train", "lora.r=0", "model=demo", "data=home_commands"],
        ["recipes", "validate", "model=demo", "data=rows", "data.train_file=README.md", "data.max_tokens=64"],
        ["train", "model.source=/nonexistent", "data=rows", "data.train_file=README.md", "data.max_tokens=64"],
    ],
    ids=lambda line: " ".join(line[:2]),
)
def test_nothing_heavy_is_imported(line):
    code = (
        "import sys; from qlora_kit.cli.verbs import main; main(sys.argv[1:]);"
        "print('HEAVY', sorted({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["engine=plain", "engine.compute=fp8"], "engine.mode=fast"),
        (["engine=fast", "engine.recompute=banana"], "engine.recompute=auto"),
        (["engine.cached_weights=lots"], "engine.cached_weights=auto"),
        (["lora.targets=[lm_head]"], "lora.targets=[all_linear] lora.modules_to_save=[lm_head]"),
    ],
)
def test_what_no_machine_could_train_is_not_planned(capsys, words, fix):
    assert main(["plan", "model=qwen3_0_6b", "data=rows", "data.max_tokens=512", *words]) == 2
    assert f"fix      {fix}" in capsys.readouterr().err


def test_what_another_machine_could_train_is_planned(capsys):
    line = ["model=qwen3_0_6b", "data=rows", "data.max_tokens=512", "engine=fast", "engine.compute=fp8"]
    assert main(["plan", *line]) == 0
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "what"),
    [("/nonexistent", "nonexistent"), (".", "config.json")],
)
@pytest.mark.parametrize("verb", [["train"], ["recipes", "validate"]])
def test_a_base_that_is_not_there_is_told_before_anything_is_loaded(capsys, monkeypatch, tmp_path, verb, source, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    line = [f"model.source={source}", "data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64"]
    assert main([*verb, *line]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("verb", ["train", "plan", "inspect", "export", "eval"])
def test_help_of_a_verb_that_takes_a_recipe_has_its_groups_and_fields(capsys, verb):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    recipe = RECIPE_OF_VERB[verb if verb in RUN_VERBS else "train"]
    paths = [path for path, _, _ in schema_paths(recipe)]
    assert len(paths) > 10
    assert not [path for path in paths if path.rsplit(".", 1)[-1].replace("<name>", "") not in shown]
    assert f"usage: qlora-kit {verb} " in shown and "\nExamples:\n" in shown


def test_every_verb_has_a_run():
    import importlib

    for verb in VERBS.values():
        assert callable(importlib.import_module(verb.module).run)


def test_unknown_verb():
    done = kit("trian")
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr


def test_no_verb_is_a_mistake():
    assert kit().returncode == 2


@pytest.mark.parametrize("rows", ["many", "0", "-1"])
def test_inspect_wants_a_number_of_rows(rows):
    done = kit("inspect", f"rows={rows}")
    assert done.returncode == 2
    assert f"rows must be a number of at least 1, got {rows}" in done.stderr
    assert "fix      rows=3" in done.stderr
