"""The benchmark of training steps, on a tiny shape: what it writes, how it fails, and how it reads its command line."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[3] / "scripts" / "bench"
RUNS = [
    "qlora_kit:plain:bf16:tiny:2x64",
    "qlora_kit:plain:bf16:tiny:packed-2x128",
    "trl:default:bf16:tiny:packed-2x128",
]
COLUMNS = {
    *("stack", "variant", "compute", "shape", "batch", "seq_len", "packed", "tokens_per_s", "peak_gb", "step_s"),
    *("first_step_s", "losses", "grad_norms"),
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def measured(folder, *arguments):
    line = [sys.executable, str(BENCH / "train_step.py"), "--cpu", "--work", str(folder / "work")]
    done = subprocess.run(
        [*line, "--results", str(folder / "results"), *arguments], capture_output=True, text=True, check=True
    )
    (place,) = folder.glob("results/cpu/train_step-*.json")
    return json.loads(place.read_text(encoding="utf-8")), done.stdout


@pytest.mark.slow
def test_stacks_train_the_same_rows_and_a_missing_one_is_a_row(tmp_path):
    found, printed = measured(tmp_path, "--ahead", "--only", *RUNS, "unsloth:default:bf16:tiny:2x64")
    assert {"versions", "memory_counter", "ceiling", "rows"} <= set(found)
    *rows, missing = found["rows"]
    assert [row["packed"] for row in rows] == [False, True, False]
    for row in rows:
        assert set(row) >= COLUMNS and "error" not in row
        assert all(math.isfinite(norm) and norm > 0 for norm in row["grad_norms"])
        assert row["losses"][-1] < row["losses"][0]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"], rel=0.01)
    assert rows[0]["tokens"] == 2 * 64
    # packed by us and padded by TRL, the same rows have the same loss; TRL's adapter is bf16
    assert rows[1]["tokens"] == rows[2]["tokens"] and rows[1]["losses"][0] == pytest.approx(rows[2]["losses"][0], 1e-3)
    assert missing["error"] == "ModuleNotFoundError: No module named 'unsloth'" and missing["stack"] == "unsloth"
    assert "No module named 'unsloth'" in printed


@pytest.mark.slow
def test_a_second_call_keeps_other_rows_and_a_limit_on_time_is_an_error(tmp_path):
    measured(tmp_path, "--only", RUNS[0], "unsloth:default:bf16:tiny:2x64", "--limit", "120")
    found, _ = measured(tmp_path, "--only", RUNS[0], "--limit", "0.5")
    assert [row["stack"] for row in found["rows"]] == ["unsloth", "qlora_kit"]
    assert found["rows"][-1]["error"] == "took longer than 0.5 s" and "step_s" not in found["rows"][-1]
    (before,) = found["rows"][-1]["before"]
    assert before["tokens_per_s"] > 0 and before["at"] <= found["rows"][-1]["at"] and "stack" not in before


@pytest.mark.slow
def test_a_saved_base_is_the_one_in_memory(tmp_path):
    from train_step.shapes import is_4bit, random_base, save_base

    from qlora_kit.model.load import load_base
    from qlora_kit.schema.quant import QuantConfig

    save_base("tiny", tmp_path / "base")
    made, loaded = random_base("tiny"), load_base(tmp_path / "base", QuantConfig())
    assert sum(map(is_4bit, made.modules())) == sum(map(is_4bit, loaded.modules())) == 14
    assert all(module.weight.quant_state.nested for module in made.modules() if is_4bit(module))
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        assert torch.equal(made.eval()(ids).logits, loaded(ids).logits)


def test_names_of_runs():
    from train_step.runs import Batch, Run

    run = Run.parse("unsloth:no_recompute:bf16:8b:packed-4x2048")
    assert run == Run("unsloth", "no recompute", "bf16", "8b", Batch(4, 2048, packed=True))
    assert str(run) == "unsloth:no_recompute:bf16:8b:packed-4x2048" and run.packs
    assert not Run.parse("liger:default:bf16:8b:packed-4x2048").packs


@pytest.mark.parametrize(
    "name, why",
    [
        ("unsloth:default:fp8:8b:4x2048", "unsloth:default:bf16"),
        ("axolotl:default:bf16:8b:4x2048", "qlora_kit"),
        ("trl:default:bf16:8b:2048", "no batch"),
        ("trl:default:8b:4x2048", "stack:variant:compute:shape:batch"),
    ],
)
def test_a_name_that_is_no_run(name, why):
    from train_step.runs import Run

    with pytest.raises(ValueError, match=why):
        Run.parse(name)


def test_quick_is_one_batch_for_every_stack():
    from train_step.runs import QUICK, every_run

    runs = every_run("8b", QUICK)
    assert {str(run.batch) for run in runs} == {"4x2048"}
    assert {run.stack for run in runs} == {"qlora_kit", "unsloth", "trl", "liger"}


def test_short_rows_fill_the_bins():
    from train_step.rows import lengths_of
    from train_step.runs import Batch

    lengths = lengths_of(Batch(4, 2048, packed=True))
    assert 0.9 * 4 * 2048 < sum(lengths) <= 4 * 2048
    assert min(lengths) >= 16 and 150 < np.mean(lengths) < 350
    assert lengths_of(Batch(2, 64)) == [64, 64]


@pytest.mark.slow
def test_a_process_waits_for_its_turn_and_for_nobody_who_has_ended(tmp_path):
    from train_step.parent import Machine
    from train_step.runs import Run

    run = Run.parse(RUNS[0])
    machine = Machine(tmp_path, tmp_path, None, None, cpu=True, limit=60)
    waiting = machine.begin("train", "waiting", run, base="", profile=False)
    assert machine.job("train", "other", run, base="", profile=False)["tokens"] == 128
    assert waiting.process.poll() is None and not (waiting.folder / "rows").exists()
    waiting.stop()
    starter = (
        "import os, sys; from pathlib import Path; from train_step.parent import Machine; "
        "from train_step.runs import Run; here = Path(sys.argv[1]); "
        "machine = Machine(here, here, None, None, cpu=True, limit=60); "
        "job = machine.begin('train', 'left', Run.parse(sys.argv[2]), base='', profile=False); "
        "print(job.process.pid, flush=True); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), str(BENCH.parents[1])))}
    line = [sys.executable, "-c", starter, str(tmp_path), RUNS[0]]
    left = int(subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + 60
    while is_running(left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(left)


def is_running(process):
    place = Path(f"/proc/{process}/stat")
    return place.exists() and place.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("growth", [2, 1.125])
@pytest.mark.parametrize("limit", [0, 1024, 5000, 8192, 70_000, 1 << 20])
def test_longest_is_near_the_last_multiple_that_fits(limit, growth):
    from train_step.longest import longest

    asked = []
    found = longest(lambda tokens: asked.append(tokens) or tokens <= limit, 8192, growth)
    assert found <= limit and found % 1024 == 0 and limit - found < max(1024, limit / 16)
    assert len(asked) == len(set(asked)) <= (12 if growth == 2 else 50)
    if growth < 2 and 8192 <= limit < 8192 * growth:
        assert len(asked) <= 2


def test_attention_in_blocks_needs_no_copies(monkeypatch):
    from torch.nn import functional
    from train_step.longest import BLOCK, attention_in_blocks

    whole = functional.scaled_dot_product_attention
    places = []

    def spied(*parts, **settings):
        places.append([part.data_ptr() for part in parts])
        return whole(*parts, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    attention_in_blocks()
    query, key, value = (torch.randn(1, 3 * BLOCK, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert found.shape == query.shape and places == [[part.data_ptr() for part in (query, key, value)]]
    for at in range(0, 3 * BLOCK, BLOCK):
        q, k, v = (part[:, :, at : at + BLOCK] for part in (query, key, value))
        exact = whole(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found[:, :, at : at + BLOCK], exact)
    with pytest.raises(RuntimeError, match="cannot be cut into blocks"):
        functional.scaled_dot_product_attention(query, key, value, attn_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    "losses, norms, doubt",
    [
        ([2.0, 1.0], [1.0, 1.0], ""),
        ([2.0, 2.0], [1.0, 1.0], "the loss went from"),
        ([2.0, 1.0], [1.0, 0.0], "gradient norm"),
        ([2.0, 1.0], [math.nan, 1.0], "gradient norm"),
        ([2.0], [1.0], "no proof"),
    ],
)
def test_steps_that_prove_nothing(losses, norms, doubt):
    from train_step.clock import Steps

    found = Steps([0.1, 0.1], losses, norms).doubt()
    assert doubt in found and bool(found) is bool(doubt)


def test_kinds_of_kernels():
    from train_step.step_profile import kind_of

    frozen = frozenset({(14336, 4096)})
    forward, backward = [[8192, 4096], [4096, 14336]], [[8192, 14336], [14336, 4096]]
    assert kind_of("nvjet_tst", "aten::mm", forward, frozen) == "frozen matmuls"
    assert kind_of("nvjet_tst", "aten::mm", backward, frozen) == "frozen matmuls"
    assert kind_of("nvjet_tst", "aten::_scaled_mm", [*forward, [8192, 1], [1, 14336]], frozen) == "frozen matmuls"
    assert kind_of("nvjet_tst", "aten::addmm", [[8192, 4096], *backward], frozen) == "frozen matmuls"
    assert kind_of("nvjet_tst", "aten::mm", [[8192, 4096], [4096, 16]], frozen) == "LoRA and head matmuls"
    assert kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma") == "attention"
    assert kind_of("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>") == "dequantise"
    assert kind_of("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>") == "optimizer"
    assert kind_of("nvjet_tst_256x128") == "matmuls of recorded layers"
    for name in (
        "triton_poi_fused_silu",
        "_glu_backward",
        "_add_n_tiles",
        "_reduce_partials",
        "_fold_rows",
        "_round_rows",
    ):
        assert kind_of(name) == "norm, activation, elementwise"
    assert kind_of("Memset (Device)") == "other"
