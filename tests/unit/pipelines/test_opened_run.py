"""A run's rows are read again only as they were."""

from dataclasses import asdict

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.summary import DataSummary, LongRowCounts, SourceSummary, SplitSummary
from qlora_kit.pipelines.opened_run import refuse_changed


def summary(train, held_out=None):
    def split(sha256):
        source = SourceSummary("train", sha256, ["messages"], 1, 0, 4, 2, 0.5)
        return SplitSummary(1, 4, 2, 0.5, 4, 64, LongRowCounts(), [source], [])

    return asdict(DataSummary(split(train), split(held_out) if held_out else None))


def test_the_same_files_pass(tmp_path):
    refuse_changed(summary({"a": "1"}), summary({"a": "1"}), tmp_path)
    refuse_changed(summary({"a": "1"}, {"b": "2"}), summary({"a": "1"}, {"b": "2"}), tmp_path)


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (summary({"a": "2"}, {"b": "2"}), "a changed"),
        (summary({"a": "1"}, {"b": "3"}), "b changed"),
        (summary({"a": "0"}, {"c": "2"}), "a, b changed"),
    ],
)
def test_a_changed_file_is_named(tmp_path, now, named):
    with pytest.raises(RecipeError) as caught:
        refuse_changed(summary({"a": "1"}, {"b": "2"}), now, tmp_path / "data.json")
    assert f"{named} since the run was trained, so its rows are other rows" in str(caught.value)
    assert str(tmp_path / "data.json") in str(caught.value)
    assert "put the file back as it was" in str(caught.value)
