"""A base whose checkpoint writes another prefix than the model is merged as any other."""

from pathlib import Path

import pytest
import torch

from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.rounded import rounded_modules
from tests.unit.export.merging.trained import NF4, Pair, merge_pair, rewrite, shard, tensors_of


def _moved(name: str) -> str:
    return name.replace("model.layers.", "model.language_model.layers.")


def test_rounded_weights_are_found_under_the_checkpoints_prefix(pair: Pair, tmp_path: Path) -> None:
    merge_pair(pair, tmp_path / "plain", quant=NF4)
    rewrite(shard(pair.base), lambda found: {_moved(name): tensor for name, tensor in found.items()})
    report = merge_pair(pair, tmp_path / "moved", quant=NF4)
    assert report.merged == report.adapted == 14
    plain, moved = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "moved")
    assert moved.keys() == {_moved(name) for name in plain}
    assert all(torch.equal(tensor, moved[_moved(name)]) for name, tensor in plain.items())


def test_a_rounded_weight_that_is_not_in_the_base_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rounded_modules(pair.base, NF4)
    monkeypatch.setattr("qlora_kit.export.merge.rounded_modules", lambda *_: {*known, "model.layers.0.mlp.other"})
    with pytest.raises(RunError, match="1 of 15 weights that were rounded in training are not in the base") as caught:
        merge_pair(pair, tmp_path / "out", quant=NF4)
    assert caught.value.problems[0].fix == "export.merge_base=original"
