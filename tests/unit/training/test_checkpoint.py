"""A checkpoint counts only when it is whole."""

from qlora_kit.training.checkpoint import last_complete, mark_complete, step_of


def test_the_newest_whole_one_wins_and_half_written_ones_go(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-5")
    mark_complete(tmp_path / "checkpoint-10")
    found = last_complete(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert step_of(found) == 10
    assert not (tmp_path / "checkpoint-100").exists()


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "absent") is None
