"""GGUF targets of a recipe: file names, settings, one importance matrix for all."""

from pathlib import Path

import gguf
import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gguf import imatrix as module
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gguf.target import gguf_file_name, write_gguf_target
from qlora_kit.schema.export import GgufMix, GgufTarget
from tests.tiny_models import build_tiny_model

ROWS = [list(range(20, 60)), list(range(100, 150))]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("target") / ".merged.x1")


@pytest.mark.slow
def test_every_target_writes_the_file_it_names(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    real = module.mean_squared_inputs
    monkeypatch.setattr(module, "mean_squared_inputs", lambda *given: measured.append(1) or real(*given))
    targets = {
        "fitted": GgufTarget(mix=GgufMix.Q4_K_M),
        "smaller": GgufTarget(mix=GgufMix.Q2_K_S, overrides={"*.attn_k.weight": "Q6_K"}),
        "plain": GgufTarget(mix=GgufMix.Q4_K_M, imatrix=False),
        "split": GgufTarget(mix=GgufMix.Q8_0, shard_gb=0.0005),
    }
    fields = {}
    imatrix = ImportanceMatrix(merged, ROWS)
    for name, target in targets.items():
        (tmp_path / name).mkdir()
        write_gguf_target(merged, target, "mine", imatrix, tmp_path / name)
        fields[name] = gguf.GGUFReader(tmp_path / name / gguf_file_name(merged, target, "mine")).fields
    assert len(measured) == 1
    assert {name: "quantize.imatrix.entries_count" in found for name, found in fields.items()} == {
        "fitted": True,
        "smaller": True,
        "plain": False,
        "split": False,
    }
    assert fields["plain"]["general.name"].contents() == "mine"
    assert fields["split"]["split.count"].contents() == len(list((tmp_path / "split").iterdir())) > 1


def test_a_mix_that_needs_a_matrix_is_refused_without(merged: Path, tmp_path: Path) -> None:
    target = GgufTarget(mix=GgufMix.IQ2_M, imatrix=False)
    with pytest.raises(RecipeError, match="without an importance matrix"):
        write_gguf_target(merged, target, "mine", ImportanceMatrix(merged, ROWS), tmp_path)
