"""The benchmark of typed lines: what it writes to disk is what a hub would give, and what it measures is the line's."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as T  # noqa: N812

from tests.tiny_tokenizers import smollm_tokenizer

BENCH = Path(__file__).resolve().parents[3] / "scripts/bench"
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
HYBRID = {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import user_line

    return user_line


@pytest.fixture
def words_folder(tmp_path):
    smollm_tokenizer().save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def made(cls, settings, layers):
    return cls(vocab_size=50000, num_hidden_layers=layers, **WIDTHS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "settings", "layers", "period"),
    [(T.Qwen3MoeConfig, MIXTURE, 3, 1), (T.Qwen3_5TextConfig, HYBRID | {"linear_value_head_dim": 16}, 6, 4)],
)
def test_one_period_of_layers_stands_for_all(bench, words_folder, tmp_path, cls, settings, layers, period):
    from random_base import Shape, write_base

    write_base(Shape(partial(made, cls, settings), layers, period), words_folder, tmp_path / "base")
    model, found = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert model.config.num_hidden_layers == layers and model.dtype == torch.bfloat16
    first, last = (
        dict(model.model.layers[place].named_parameters()) for place in (0, layers - period + period % 2 - 1)
    )
    shared = [name for name in first if name in last and first[name].ndim > 1]
    assert shared and not any(torch.equal(first[name], last[name]) for name in shared)


@pytest.mark.slow
def test_several_processes_write_the_files_that_one_writes(bench, words_folder, tmp_path):
    from random_base import Shape, write_base

    shape = Shape(partial(made, T.LlamaConfig, {}), 5)
    for jobs in (1, 2):
        write_base(shape, words_folder, tmp_path / str(jobs), jobs)
    one, two = (sorted((tmp_path / jobs).glob("*.safetensors")) for jobs in ("1", "2"))
    assert [file.name for file in one] == [file.name for file in two] and len(one) == 5
    assert all(file.read_bytes() == other.read_bytes() for file, other in zip(one, two, strict=True))
    indexes = [json.loads((tmp_path / jobs / "model.safetensors.index.json").read_text("utf-8")) for jobs in ("1", "2")]
    assert indexes[0] == indexes[1]


def test_cases_of_one_day_are_kept_beside_each_other(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    versions = {"torch": "1"}
    monkeypatch.setattr("qlora_kit.core.environment.capture_environment", lambda: versions)

    def line(case, seconds):
        return bench.Line(case, "qlora_kit", [], 0.0, 0, seconds)

    def kept():
        (file,) = (tmp_path / "a_card").glob("user_line-*.json")
        return [(one["case"], one["seconds"]) for one in json.loads(file.read_text("utf-8"))["lines"]]

    bench.write([line("a", 1.0), line("b", 1.0)], tmp_path)
    bench.write([line("b", 2.0)], tmp_path)
    assert kept() == [("a", 1.0), ("b", 2.0)]
    versions = {"torch": "2"}
    bench.write([line("b", 3.0)], tmp_path)
    assert kept() == [("b", 3.0)]  # others are not of these versions


def test_names_beyond_the_last_layer_are_none(bench):
    from random_base import renumbered

    assert (
        renumbered("model.layers.1.mlp.experts.7.up_proj.weight", 4, 6) == "model.layers.5.mlp.experts.7.up_proj.weight"
    )
    assert renumbered("model.layers.2.mlp.up_proj.weight", 4, 6) is None
    assert renumbered("model.norm.weight", 4, 6) == "model.norm.weight"


def test_full_rows_are_almost_as_long_as_they_may_be(bench, words_folder, tmp_path, monkeypatch):
    import chat_rows

    monkeypatch.setattr(chat_rows, "FULL_ROWS", 5)
    chat_rows.write_full(words_folder, tmp_path / "rows.jsonl", 1024)
    words = T.AutoTokenizer.from_pretrained(words_folder)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths = [len(words(words.apply_chat_template(row, tokenize=False))["input_ids"]) for row in rows]
    assert len(lengths) == 5 and max(lengths) <= 1024 and min(lengths) > 950


@pytest.mark.slow
def test_a_line_is_run_as_typed_and_its_steps_are_timed(bench, words_folder, tmp_path):
    import chat_rows
    from random_base import Shape, write_base

    write_base(Shape(partial(made, T.Qwen3MoeConfig, MIXTURE), 2), words_folder, tmp_path / "tiny")
    chat_rows.write_mixed(words_folder, tmp_path / "mixed.jsonl")
    words = ("data=rows", "data.max_tokens=2048", "trainer.batch_size=1", "trainer.max_steps=2", "data.eval_rows=2")
    line = bench.run(bench.Case("tiny", "tiny", words), tmp_path, 300, None)
    log = (tmp_path / "runs/tiny/log.txt").read_text()
    assert line.exit_code == 0 and not line.error, log
    assert 0 < line.first_step_seconds <= line.last_step_seconds <= line.seconds
    assert line.result["tokens"] > 0 and "2" in line.losses
    assert "tiny" in bench.shown(line)


@pytest.mark.slow
def test_a_line_that_fails_keeps_its_error_and_no_earlier_result(bench, tmp_path):
    earlier = tmp_path / "runs/broken/outputs/run/earlier/result.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"tokens": 1}')
    line = bench.run(bench.Case("broken", "nowhere", ("data=rows", "data.max_tokens=64")), tmp_path, 120, None)
    assert line.exit_code != 0 and "no such file" in line.error
    assert line.result == {}


def test_a_rate_is_all_tokens_behind_the_first_steps_by_their_time(bench):
    steps = [
        {"tokens": 100.0 * step, "seconds": 2.0 * step + (3 if step == bench.WARM + 1 else 0)} for step in range(9)
    ]
    assert bench.rate(steps[1:]) == pytest.approx(100 * 3 / 6)
    steps[-1]["seconds"] += 3  # a step in which something is captured counts
    assert bench.rate(steps[1:]) == pytest.approx(100 * 3 / 9, abs=0.1)
    assert bench.rate(steps[: bench.WARM]) == 0


def test_every_case_has_its_model_and_its_peer_a_script(bench):
    assert {case.model for case in bench.CASES} <= set(bench.shapes())
    assert len({case.name for case in bench.CASES}) == len(bench.CASES)
    assert all((BENCH / f"user_line_{case.peer}.py").exists() for case in bench.CASES if case.peer)
    assert sys.modules["user_line"] is bench
