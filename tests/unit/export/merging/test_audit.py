"""The audit of the merged folder as it lies on disk: what is planted in it is found, and named."""

from pathlib import Path

import pytest

from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.audit import audit_folder
from qlora_kit.export.merging.carry import PROCESSORS
from qlora_kit.model.stored_names import stored_names
from qlora_kit.weights.headers import read_headers
from tests.unit.export.merging.trained import Pair, edit_json, merge_pair, rewrite, shard


@pytest.fixture
def merged(pair: Pair, tmp_path: Path) -> tuple[Path, Path]:
    merge_pair(pair, tmp_path / "out")
    return tmp_path / "out", pair.base


def check(merged: tuple[Path, Path], tokens: int | None = 600) -> None:
    names = read_headers(merged[1])
    audit_folder(*merged, names, stored_names(merged[1], names), tokens)


def test_good_folder_passes_and_has_what_the_base_carries(merged: tuple[Path, Path]) -> None:
    check(merged)
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "generation_config.json", *PROCESSORS):
        assert (merged[0] / name).read_bytes() == (merged[1] / name).read_bytes()


def test_planted_untied_head(merged: tuple[Path, Path]) -> None:
    rewrite(shard(merged[0]), lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"] + 1})
    with pytest.raises(RunError, match=r"the head is untied: config.json says tie_word_embeddings, but lm_head.weight"):
        check(merged)


def test_planted_tie_lost_in_the_config(merged: tuple[Path, Path]) -> None:
    edit_json(merged[0] / "config.json", tie_word_embeddings=False)
    with pytest.raises(RunError, match=r"the head is missing: config.json says that it is not tied"):
        check(merged)


def test_planted_wrong_vocabulary(merged: tuple[Path, Path]) -> None:
    with pytest.raises(RunError, match=r"the tokenizer has 700 tokens, and model.embed_tokens.weight has 640 rows"):
        check(merged, tokens=700)
    edit_json(merged[0] / "config.json", vocab_size=639)
    with pytest.raises(RunError, match=r"has 640 rows, and config.json says vocab_size=639"):
        check(merged)


def test_planted_missing_and_unexpected_tensors(merged: tuple[Path, Path]) -> None:
    rewrite(shard(merged[0]), lambda found: {n.replace("1.mlp.up_proj", "1.mlp.up"): t for n, t in found.items()})
    with pytest.raises(RunError) as caught:
        check(merged)
    assert "1 tensor is missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "1 tensor is unexpected: model.layers.1.mlp.up.weight" in str(caught.value)


def test_planted_dtype_quantization_and_lost_files(merged: tuple[Path, Path]) -> None:
    rewrite(shard(merged[0]), lambda found: {n: t.float() if n == "model.norm.weight" else t for n, t in found.items()})
    edit_json(merged[0] / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    (merged[0] / "generation_config.json").unlink()
    with pytest.raises(RunError) as caught:
        check(merged)
    assert "1 tensor is not bfloat16: model.norm.weight" in str(caught.value)
    assert "config.json says that these 16-bit weights are quantized" in str(caught.value)
    assert "generation_config.json of the base is missing" in str(caught.value)


def test_planted_truncated_output(merged: tuple[Path, Path]) -> None:
    file = shard(merged[0])
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(RunError, match=r"out/model.safetensors: it is truncated"):
        check(merged)
