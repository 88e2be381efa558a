"""Ten wrong recipes: one message each with a line to paste, exit code 2, quickly, before anything is written."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

GOOD = ["model.source=base", "data=messages", "data.train_file=rows.jsonl", "data.max_tokens=64"]
WIDTHS = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}
RUN = ["run=outputs/done/1", "export=gptq_4bit"]

WRONG = {
    "typo in a key": (["train", *GOOD, "lora.rr=4"], "there is no field 'lora.rr'", "lora.r=4"),
    "typo in a group": (["train", *GOOD, "quant=nf5"], "there is no quant named 'nf5'", "quant=nf4"),
    "unknown key with +": (["train", *GOOD, "+new.key=1"], "there is no field 'new.key'", "qlora-kit train --help"),
    "wrong type": (["train", *GOOD, "lora.r=abc"], "lora.r cannot be 'abc': it is int", "lora.r=16"),
    "rank 0": (["train", *GOOD, "lora.r=0"], "lora.r must be at least 1, got 0", "lora.r=1"),
    "unknown target": (
        ["train", *GOOD, "lora.targets=[q_prj]"],
        "lora.targets names q_prj, which is no linear module of this base",
        "lora.targets=[all_linear]",
    ),
    "missing file": (
        ["train", *GOOD[:2], "data.train_file=data/home_commands/train.jsonl", GOOD[3]],
        "no such file: data/home_commands/train.jsonl",
        "python -m qlora_kit.data.home_commands --out data/home_commands",
    ),
    "paged optimizer on a CPU without a fallback": (
        ["train", *GOOD, "optim.fallback=false"],
        "optim.name=paged_adamw_8bit needs a GPU",
        "optim.fallback=true",
    ),
    "group size that divides no layer": (
        ["export", *RUN, "export.gptq.gptq_4bit.group_size=100"],
        "group_size=100 does not divide in_features=576 of 'model.layers.*.self_attn.q_proj'; 16, 32, 64 do",
        "export.gptq.gptq_4bit.group_size=64",
    ),
    "DoRA with an unmergeable choice": (
        ["train", *GOOD, "lora=dora", "lora.init=pissa"],
        "lora.init=pissa (with or without DoRA) cannot be trained and merged on a nf4 base",
        "lora.init=default",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose headers name its modules, rows, and a finished run; no weight that could be loaded."""
    place = tmp_path_factory.mktemp("wrong")
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text(json.dumps({"model_type": "llama", **WIDTHS}))
    (place / "base" / "tokenizer.json").write_text("{}")
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "input_layernorm")
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(2, 2) for name in names}
    save_file(tensors, place / "base" / "model.safetensors")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (place / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run = place / "outputs" / "done" / "1"
    (run / "adapter").mkdir(parents=True)
    (run / "result.json").write_text("{}")
    shown = kit(place, "recipes", "show", *GOOD)
    assert shown.returncode == 0, shown.stderr
    (run / "recipe.yaml").write_text(shown.stdout)
    return place


def kit(folder, *words):
    """Run `qlora-kit` as on a machine without a GPU."""
    command = [sys.executable, "-m", "qlora_kit", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("case", WRONG)
def test_one_message_with_a_line_to_paste(folder, case):
    words, what, fix = WRONG[case]
    before = sorted(folder.rglob("*"))
    began = time.perf_counter()
    done = kit(folder, *words)
    seconds = time.perf_counter() - began
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert what in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("  fix ")]
    assert fix in line
    assert "Traceback" not in done.stderr
    assert seconds < 3  # 0.5 to 1.0 s on an idle core
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_budget_of_bits_that_no_choice_meets_is_told_before_anything_is_written(folder):
    before = sorted(folder.rglob("*"))
    done = kit(folder, "export", *RUN, "export.gptq.gptq_4bit.group_size=64", "export.bits_budget=4")
    assert done.returncode == 2, done.stderr
    what = "export.bits_budget=4 cannot be met by export.gptq.gptq_4bit: the smallest formats have 4.312 bits a weight"
    assert what in done.stderr
    assert "  fix      export.bits_budget=4.32" in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_mistakes_are_told_all_at_once(folder):
    done = kit(folder, "train", *GOOD, "lora.rr=4", "quant=nf5", "trainer.epochs=many", "+x.y=1")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 4


def test_wrong_values_are_told_all_at_once(folder):
    done = kit(folder, "train", *GOOD, "lora.r=0", "optim.learning_rate=0", "lora.dropout=2", "optim.fallback=false")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 4


def test_debug_shows_where(folder):
    done = kit(folder, "train", *GOOD, "lora.r=0", "debug=true")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_recipe_file_with_an_unknown_key(folder, tmp_path):
    experiment = tmp_path / "recipes" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "mine.yaml").write_text("# @package _global_\noptim:\n  learning_rat: 1\n")
    done = kit(tmp_path, "train", *GOOD, "experiment=mine")
    assert done.returncode == 2
    assert "holds the unknown key 'learning_rat'; did you mean 'learning_rate'?" in done.stderr


def test_a_users_recipe_wins_over_a_packaged_one(folder, tmp_path):
    group = tmp_path / "recipes" / "lora"
    group.mkdir(parents=True)
    (group / "all_linear.yaml").write_text("r: 3\n")
    done = kit(tmp_path, "recipes", "show", "model=demo", "data=messages", *absolute(folder))
    assert "  r: 3\n" in done.stdout


def absolute(folder):
    return [f"data.train_file={folder / 'rows.jsonl'}", "data.max_tokens=64"]


def test_where_a_value_was_set(folder, tmp_path):
    experiment = tmp_path / "recipes" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "mine.yaml").write_text("# @package _global_\nlora:\n  r: 0\n")
    done = kit(tmp_path, "train", "model=demo", "data=messages", *absolute(folder), "experiment=mine")
    assert done.returncode == 2
    assert "recipes/experiment/mine.yaml" in done.stderr
