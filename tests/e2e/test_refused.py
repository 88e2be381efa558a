"""A run that is refused while its rows or its base are read leaves nothing behind."""

import pytest

from tests.e2e.conftest import kit, train_line

pytestmark = pytest.mark.slow

REFUSED = {
    "empty rows": ("data.train_file=empty.jsonl", "empty.jsonl"),
    "no base there": ("model.source=nobody/nothing", "nobody/nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_run_leaves_nothing_behind(workshop, tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("")
    override, told = REFUSED[name]

    done = kit(
        tmp_path, *[word for word in train_line(workshop) if word.split("=")[0] != override.split("=")[0]], override
    )

    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "\n  do  " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_folders_of_other_runs_stay(workshop, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "outputs" / "train" / "mine").mkdir(parents=True)

    kit(tmp_path, *train_line(workshop, "data.train_file=empty.jsonl", "name=train"))

    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("outputs/**/*")] == [
        "outputs/train",
        "outputs/train/mine",
    ]
