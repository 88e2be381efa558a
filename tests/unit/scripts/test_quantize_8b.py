"""The benchmark of quantization, on a tiny shape: what it writes, how a run fails, and what its error says."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[3] / "scripts" / "bench"
COLUMNS = {"stack", "target", "layers", "rows", "seq_len", "seconds", "per_layer_s", "whole_s", "peak_gb"}
SIZES = ["--shape", "tiny", "--rows", "2", "--seq-len", "32"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def run(folder, *line):
    command = [sys.executable, BENCH / "quantize_8b.py", *SIZES, "--work", folder / "work", "--results", folder, *line]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_each_run_is_a_row_with_its_rate_and_its_error(tmp_path):
    done = run(tmp_path, "--layers", "2", "1", "--only", "qlora_kit:awq")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/quantize_tiny-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["layers"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() >= COLUMNS
        assert 0.01 < row["output_error"] < 0.5  # 4 bit; unpacked in a wrong order it is above 1
    assert rows[1]["per_layer_s"] == pytest.approx(rows[1]["seconds"] - rows[0]["seconds"], abs=2e-3)
    assert "output_error" in done.stdout


@pytest.mark.parametrize(("limit", "error"), [(0.01, "more than 0.01 s"), (100, "No such file or directory")])
def test_a_run_that_fails_says_why_in_its_row(limit, error, tmp_path):
    from quantize_8b import run_child

    chosen = argparse.Namespace(work=tmp_path, shape="tiny", rows=2, seq_len=32, limit=limit)
    assert error in run_child(chosen, "qlora_kit:awq", [1])["error"]


def test_a_stack_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    done = run(tmp_path, "--only", "qlora_kit:gguf")
    assert done.returncode == 2
    assert "qlora_kit:gguf is none of qlora_kit:fp8, " in done.stderr


def test_rates_are_the_difference_from_the_run_with_the_fewest_layers():
    from quantize_8b import add_rates

    alike = {"stack": "a", "target": "gptq", "rows": 8, "seq_len": 16}
    rows = [
        {**alike, "layers": 1, "seconds": 12.0},
        {**alike, "layers": 4, "seconds": 18.0},
        {**alike, "layers": 8, "error": "out of memory"},
        {**alike, "stack": "b", "layers": 4, "seconds": 8.0},
    ]
    add_rates(rows, 32)
    assert (rows[1]["per_layer_s"], rows[1]["whole_s"]) == (2.0, 74.0)
    assert "whole_s" not in rows[2]
    assert (rows[3]["per_layer_s"], rows[3]["whole_s"]) == (2.0, 64.0)


def test_the_same_weights_in_each_layout_come_back_dense(tmp_path):
    from quantize_8b_error import dense_weights
    from safetensors.torch import save_file

    from qlora_kit.export.grid import decode, encode, span
    from qlora_kit.formats.awq.layout import gemm_tensors
    from qlora_kit.formats.gptq import layout as gptq_layout

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    groups = weight.view(64, 2, 128)
    grid = span(groups.amin(-1), groups.amax(-1), bits=4, zero_point=True)
    codes = encode(weight, grid)
    eight = weight.to(torch.float8_e4m3fn)
    tensors = {
        **{f"a.{kind}": value for kind, value in gemm_tensors(codes, grid.scale, grid.zero).items()},
        **{f"g.{kind}": value for kind, value in gptq_layout.packed_tensors(codes, grid).items()},
        "f.weight": eight,
        "f.weight_scale": torch.full((64, 1), 2.0),
        "n.weight": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = dense_weights(tmp_path)
    assert found["a.weight"].equal(decode(codes, grid))
    assert found["g.weight"].equal(decode(codes, grid))
    assert found["f.weight"].equal(eight.float() * 2)
    assert found["n.weight"].equal(torch.ones(3))


def test_packed_weights_of_compressed_tensors_come_back_dense(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from quantize_8b_error import dense_weights
    from safetensors.torch import save_file

    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    zero = torch.randint(-8, 8, (16, 2), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    tensors = {
        "p.weight_packed": pack_to_int32(codes, 4),
        "p.weight_zero_point": pack_to_int32(zero, 4, packed_dim=0).contiguous(),
        "p.weight_scale": torch.full((16, 2), 0.5),
        "p.weight_shape": torch.tensor([16, 64]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    by_hand = torch.cat([(codes[:, :32] - zero[:, :1].float()) * 0.5, (codes[:, 32:] - zero[:, 1:].float()) * 0.5], 1)
    assert dense_weights(tmp_path)["p.weight"].equal(by_hand)
