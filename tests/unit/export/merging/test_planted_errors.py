"""Each planted error is found, and named: in the base, in the adapter, in the merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.adapter.updates import Update
from qlora_kit.core.errors import RunError
from qlora_kit.export.merge import refuse_full_disk
from qlora_kit.export.merging import blocks
from qlora_kit.export.merging.audit import audit_changes
from qlora_kit.export.merging.write_shards import Written
from tests.unit.export.merging.trained import WEIGHTS, Pair, edit_json, merge_pair, rewrite, shard


def test_truncated_shard(pair: Pair, tmp_path: Path) -> None:
    file = shard(pair.base)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"base/model.safetensors: it is truncated: \d+ bytes where .* needs \d+"):
        merge_pair(pair, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_shard_with_bytes_too_many(pair: Pair, tmp_path: Path) -> None:
    file = shard(pair.base)
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(RunError, match="it is too long"):
        merge_pair(pair, tmp_path / "out")


def test_shard_whose_table_is_damaged(pair: Pair, tmp_path: Path) -> None:
    file = shard(pair.base)
    data = bytearray(file.read_bytes())
    data[20] = 0xFF
    file.write_bytes(data)
    with pytest.raises(RunError, match="its table of tensors is not JSON"):
        merge_pair(pair, tmp_path / "out")


def test_shard_that_is_nearly_empty(pair: Pair, tmp_path: Path) -> None:
    shard(pair.base).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RunError, match="do not hold the table that they should begin with"):
        merge_pair(pair, tmp_path / "out")


def test_missing_shard_and_index_that_lies(pair: Pair, tmp_path: Path) -> None:
    names = dict.fromkeys(load_file(shard(pair.base)), "model.safetensors")
    index = pair.base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**names, "more.weight": "model-2.safetensors"}}))
    with pytest.raises(RunError, match=r"model-2.safetensors: the file is missing"):
        merge_pair(pair, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {**names, "more.weight": "model.safetensors"}}))
    with pytest.raises(RunError, match=r"it says that model.safetensors holds more.weight, which is not there"):
        merge_pair(pair, tmp_path / "out2")
    index.write_text("{}")
    with pytest.raises(RunError, match="it has no weight_map"):
        merge_pair(pair, tmp_path / "out3")


def test_damaged_values(pair: Pair, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        return tensors

    rewrite(shard(pair.base), spoil)
    with pytest.raises(RunError, match=r"layers.1.mlp.up_proj.weight is not finite when merged: model.safetensors is"):
        merge_pair(pair, tmp_path / "out")


def test_adapter_that_learned_nothing(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / WEIGHTS, lambda found: {n: t * ("lora_B" not in n) for n, t in found.items()})
    with pytest.raises(RunError, match="the adapter learned nothing: the update of each of its 14 modules is zero"):
        merge_pair(pair, tmp_path / "out")


def test_module_that_learned_nothing_is_counted(pair: Pair, tmp_path: Path) -> None:
    rewrite(pair.adapter / WEIGHTS, lambda found: {n: t * ("0.mlp.up_proj" not in n) for n, t in found.items()})
    report = merge_pair(pair, tmp_path / "out")
    assert (report.unlearned, report.changed, report.merged) == (1, 13, 14)


def test_merge_that_changes_nothing(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "add", lambda *arguments: None)
    with pytest.raises(RunError, match="the merge changed nothing: after rounding to bfloat16, each of the 14"):
        merge_pair(pair, tmp_path / "out")


def test_merge_that_forgets_a_tensor(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = blocks._added

    def forget(piece: Any, weight: Any, update: Any, *rest: Any, **named: Any) -> Any:
        if piece.name == "model.layers.0.self_attn.v_proj.weight":
            update = Update(torch.zeros_like(update.left), update.right, None)
        return added(piece, weight, update, *rest, **named)

    monkeypatch.setattr(blocks, "_added", forget)
    with pytest.raises(RunError, match=r"left 1 of 14 adapted tensors unchanged: model.layers.0.self_attn.v_proj"):
        merge_pair(pair, tmp_path / "out")


def test_change_that_is_not_the_adapters() -> None:
    written = [Written("a.weight", True, 1), Written("b.weight", True, 2), Written("c.weight", True, 3)]
    with pytest.raises(RunError, match=r"changed 1 tensor that the adapter does not touch: b.weight"):
        audit_changes(written, {"a.weight"}, {"c.weight"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "an adapter with lora_bias=True cannot be merged"),
        ({"trainable_token_indices": [1]}, r"an adapter with trainable_token_indices=\[1\] cannot be merged"),
        ({"init_lora_weights": "corda"}, "an adapter with init_lora_weights=corda cannot be merged"),
        ({"peft_type": "IA3"}, "the adapter is IA3; only LoRA adapters can be merged"),
        ({"use_dora": True}, "the adapter's use_dora does not fit what it holds"),
        ({"r": 8}, "gives model.layers.0.mlp.down_proj rank 8, its factors have 4"),
    ],
)
def test_adapter_of_another_kind(pair: Pair, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(pair.adapter / "adapter_config.json", **changes)
    with pytest.raises(RunError, match=message):
        merge_pair(pair, tmp_path / "out")


def test_adapter_with_a_file_missing(pair: Pair, tmp_path: Path) -> None:
    (pair.adapter / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=r"is no adapter: it has no adapter_config.json"):
        merge_pair(pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {n: t for n, t in found.items() if "1.mlp.up_proj.lora_A" not in n}, "are no pair of factors"),
        (lambda found: {**found, "base_model.model.x.lora_C.weight": torch.ones(1)}, "which cannot be merged"),
        (
            lambda found: {n.replace("layers.1", "layers.7"): t for n, t in found.items()},
            r"it changes model.layers.7.*, which the base does not have",
        ),
        (
            lambda found: {n: t[:-1] if "0.mlp.up_proj.lora_B" in n else t for n, t in found.items()},
            r"its update of model.layers.0.mlp.up_proj is \[511, 256\] where the base's weight is \[512, 256\]",
        ),
        (
            lambda found: {**found, "base_model.model.model.norm.weight": torch.ones(8)},
            r"its model.norm.weight is \[8\] where the base's is \[256\]",
        ),
        (lambda found: {n: t / 0 for n, t in found.items()}, "holds values that are not finite"),
        (lambda found: {n: t.int() + 1 for n, t in found.items()}, "is stored as I32"),
    ],
)
def test_adapter_whose_tensors_do_not_fit(pair: Pair, tmp_path: Path, change: Any, message: str) -> None:
    rewrite(pair.adapter / WEIGHTS, change)
    with pytest.raises(RunError, match=message):
        merge_pair(pair, tmp_path / "out")


def test_base_that_is_quantized_in_another_way(pair: Pair, tmp_path: Path) -> None:
    edit_json(pair.base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(RunError, match="the base is quantized with gptq"):
        merge_pair(pair, tmp_path / "out")


def test_disk_that_is_too_small(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 51_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(RunError, match=r"the merged model takes 2.7 MB, and 51.0 MB are free on the disk of"):
        merge_pair(pair, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    refuse_full_disk(900_000, tmp_path)
