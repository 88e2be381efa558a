"""What a run is called."""

import pytest

from qlora_kit.cli.line import parse_line
from qlora_kit.cli.run_name import named
from qlora_kit.core.shell import override


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipes" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    return file


def test_a_run_is_named_after_its_experiment(experiment):
    experiment.write_text("# @package _global_\nmodel:\n  name: other\n", encoding="utf-8")
    assert named(parse_line(["experiment=mine"])) == ["experiment=mine", "name=mine"]


def test_the_name_in_an_experiments_file_is_kept(experiment):
    experiment.write_text("# @package _global_\nname: lamps\n", encoding="utf-8")
    assert named(parse_line(["experiment=mine"])) == ["experiment=mine"]


def test_the_name_on_the_line_is_kept(experiment):
    experiment.write_text("# @package _global_\nname: lamps\n", encoding="utf-8")
    assert named(parse_line(["experiment=mine", "name=doors"])) == ["experiment=mine", "name=doors"]


def test_a_file_that_cannot_be_read_is_left_to_composing(experiment):
    experiment.write_text("name: [", encoding="utf-8")
    assert named(parse_line(["experiment=mine"])) == ["experiment=mine", "name=mine"]


def test_a_name_is_text_whatever_is_in_it(experiment):
    file = experiment.with_name("it's (1).yaml")
    file.write_text("# @package _global_\n", encoding="utf-8")
    (_, name) = named(parse_line([override("experiment", "it's (1)")]))
    assert name == override("name", "it's (1)")
