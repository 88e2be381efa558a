"""The record of an artifact."""

import json

from qlora_kit.export.manifest import MANIFEST, read_manifest, record_scores


def test_scores_are_added_to_the_manifest(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "a"}')
    record_scores(tmp_path, {"loss": 1.0})
    assert read_manifest(tmp_path) == {"name": "a", "evaluation": {"loss": 1.0}}


def test_scores_are_not_written_through_a_link(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"name": "a"}')
    (tmp_path / "link").symlink_to(tmp_path / "other")
    record_scores(tmp_path / "link", {"loss": 1.0})
    assert json.loads((tmp_path / "other" / MANIFEST).read_text()) == {"name": "a"}
    assert "is a link, so its manifest stays as it was" in capsys.readouterr().err
