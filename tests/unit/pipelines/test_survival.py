"""What a manifest says of an update's survival."""

import pytest

from qlora_kit.export.delta_survival import DeltaSurvival, LayerSurvival
from qlora_kit.pipelines.survival import record

KEPT = LayerSurvival("layers.0.q_proj.weight", 0.9, 0.1, 0.01, 1.0)
LOST = LayerSurvival("layers.0.up_proj.weight", 0.2, 2.0, 0.01, 1.0)


def test_a_file_that_was_not_measured_has_no_entry() -> None:
    assert record(None) == {}


def test_the_entry_has_every_kind_and_what_the_user_was_told() -> None:
    entry = record(DeltaSurvival((KEPT, LOST)))
    assert entry["worst"] == LOST.name and entry["worst_kept"] == LOST.kept
    assert entry["kinds"] == {
        "q_proj": {"kept": pytest.approx(0.9), "worst_kept": 0.9},
        "up_proj": {"kept": pytest.approx(0.2), "worst_kept": 0.2},
    }
    assert str(entry["warning"]).startswith("the file keeps")


def test_there_is_no_warning_where_all_is_well() -> None:
    assert record(DeltaSurvival((KEPT,)))["warning"] == ""
