"""Weights that were rounded in training have to be in the base."""

from pathlib import Path

import pytest

from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.rounded import rounded_modules
from tests.unit.export.merging.trained import NF4, Pair, merge_pair


def test_a_rounded_weight_that_is_not_in_the_base_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rounded_modules(pair.base, NF4)
    monkeypatch.setattr("qlora_kit.export.merge.rounded_modules", lambda *_: {*known, "model.layers.0.mlp.other"})
    with pytest.raises(RunError, match="1 of 15 weights that were rounded in training are not in the base") as caught:
        merge_pair(pair, tmp_path / "out", quant=NF4)
    assert caught.value.problems[0].fix == "export.merge_base=original"
