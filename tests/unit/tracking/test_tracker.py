"""metrics.jsonl is always written, survives a kill, and rewinds with a checkpoint."""

import json

from qlora_kit.core.rundir import RunDirectory
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.tracking.tracker import open_trackers, read_metrics, rewind_metrics


def test_jsonl_is_always_written(tmp_path):
    tracker = open_trackers(TrackerConfig(), RunDirectory(tmp_path), {})
    tracker.log(1, {"loss": 2.5})
    tracker.finish()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}


def test_a_half_written_line_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "tokens": 100 * step}) + "\n" for step in (1, 2, 3)))
    assert rewind_metrics(path, 2) == 200
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert rewind_metrics(path, 0) == 0
