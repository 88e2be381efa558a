"""What the merged folder holds: tie, vocabulary, updates of the embedding, shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.export.merging import plan
from qlora_kit.export.merging.audit import audit_folder
from qlora_kit.model.stored_names import stored_names
from qlora_kit.weights.headers import read_headers
from tests.unit.export.merging.trained import WEIGHTS, Pair, merge_pair, rewrite, shard


def test_tied_base_that_stores_its_head_too(pair: Pair, tmp_path: Path) -> None:
    rewrite(shard(pair.base), lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()})
    report = merge_pair(pair, tmp_path / "same")
    assert report.tied
    assert "lm_head.weight" not in load_file(shard(tmp_path / "same"))
    rewrite(shard(pair.base), lambda found: {**found, "lm_head.weight": found["lm_head.weight"] + 1})
    report = merge_pair(pair, tmp_path / "other")
    assert report.untied  # transformers loads such a base untied
    assert "lm_head.weight" in load_file(shard(tmp_path / "other"))


def test_added_tokens_make_the_vocabulary_longer(pair: Pair, tmp_path: Path) -> None:
    longer = torch.randn(650, 256)
    rewrite(pair.adapter / WEIGHTS, lambda found: {**found, **_both_tables(longer)})
    report = merge_pair(pair, tmp_path / "out", words=650)
    assert report.tied  # both were saved, alike
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 650
    torch.testing.assert_close(
        load_file(shard(tmp_path / "out"))["model.embed_tokens.weight"], longer.bfloat16(), rtol=0, atol=0
    )


def _both_tables(table: torch.Tensor) -> dict[str, torch.Tensor]:
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    return {name: table.clone() for name in names}


def test_low_rank_update_of_embedding_and_head(pair: Pair, tmp_path: Path) -> None:
    a, b = torch.randn(4, 640) * 0.1, torch.randn(256, 4) * 0.1
    head_a, head_b = torch.randn(4, 256) * 0.1, torch.randn(640, 4) * 0.1
    added = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.lora_A.weight": head_a,
        "base_model.model.lm_head.lora_B.weight": head_b,
    }
    rewrite(pair.adapter / WEIGHTS, lambda found: {**found, **added})
    report = merge_pair(pair, tmp_path / "out")
    before, after = load_file(shard(pair.base)), load_file(shard(tmp_path / "out"))
    table = before["model.embed_tokens.weight"].float()
    scale = 32 / 4
    torch.testing.assert_close(
        after["model.embed_tokens.weight"].float(), table + scale * (b @ a).T, rtol=2**-7, atol=1e-5
    )
    torch.testing.assert_close(after["lm_head.weight"].float(), table + scale * head_b @ head_a, rtol=2**-7, atol=1e-5)
    assert report.untied
    assert report.merged == report.adapted == 16


def test_shards_are_those_of_the_base(pair: Pair, tmp_path: Path) -> None:
    tensors = load_file(shard(pair.base))
    shard(pair.base).unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, pair.base / file)
    where = {name: file for file, held in files.items() for name in held}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    merge_pair(pair, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())


def test_grown_shards_are_split(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LARGEST_BASE_SHARD", 1_000_000)
    monkeypatch.setattr(plan, "SHARD_BYTES", 800_000)
    merge_pair(pair, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert len(files) > 2
    assert all(file.stat().st_size < 810_000 for file in files)
    names = read_headers(pair.base)
    audit_folder(tmp_path / "out", pair.base, names, stored_names(pair.base, names), 600)
