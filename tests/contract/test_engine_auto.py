"""`engine=auto` through the command line."""

from qlora_kit.cli.verbs import main
from tests.e2e.conftest import only_run, train_line, write_rows
from tests.tiny_models import build_tiny_model


def test_a_plan_is_made_for_a_gpu_that_has_the_kernels(tmp_path, capsys):
    folder = build_tiny_model("llama", tmp_path / "base")
    rows, plans = tmp_path / "rows.jsonl", []
    write_rows(rows, 4, 1, "turn on")
    for engine in ("auto", "fast", "plain"):
        line = ["plan", f"model.source={folder}", "data=rows", "data.max_tokens=64", f"data.train_file={rows}"]
        assert main([*line, f"engine={engine}", "card=24GB"]) == 0
        plans.append(capsys.readouterr())
    assert plans[0].out == plans[1].out != plans[2].out


def test_a_run_on_a_cpu_is_plain_and_says_so(tmp_path, monkeypatch, capsys):
    build_tiny_model("llama", tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 4, 1, "turn on")
    write_rows(tmp_path / "held_out.jsonl", 4, 2, "please start")
    monkeypatch.chdir(tmp_path)
    assert main(train_line(tmp_path, "engine=auto", "trainer.max_steps=2")) == 0
    assert "engine: plain, by engine.mode=auto: there is no GPU" in capsys.readouterr().err
    assert "mode: auto" in (only_run(tmp_path) / "recipe.yaml").read_text(encoding="utf-8")
