"""Which run is meant, and where its page may go."""

import os

import pytest

from qlora_kit.cli.report import run as report_verb
from qlora_kit.core.errors import RecipeError
from qlora_kit.pipelines.report import any_run, report
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.open import open_idle_run
from qlora_kit.schema.compose import compose_unchecked, recipe_yaml

RECIPE = recipe_yaml(
    compose_unchecked("train", ["model=demo", "data=messages", "data.train_file=a.jsonl", "data.max_tokens=256"])
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs below outputs/ of the working folder, each newer than the one before."""
    monkeypatch.chdir(tmp_path)
    made = []

    def run(name, *, finished):
        directory = RunDirectory(tmp_path / "outputs" / name / "2026-01-31_12-00-00")
        directory.path.mkdir(parents=True)
        directory.recipe.write_text(RECIPE)
        os.utime(directory.recipe, (1000 + len(made), 1000 + len(made)))
        if finished:
            directory.adapter.mkdir()
            directory.result.write_text("{}")
        made.append(directory)
        return directory

    return run


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_latest_is_the_newest_whether_finished_or_not(make, order):
    _, newest = make("old", finished=order[0]), make("new", finished=order[1])
    assert any_run("latest").path.resolve() == newest.path


def test_a_page_lies_in_its_run_unless_told_otherwise(make, tmp_path, capsys):
    run = make("mine", finished=False)
    assert report_verb([f"run={run.path}"]) == 0
    assert (run.path / "report.html").read_text().startswith("<!doctype html>")
    assert report_verb(["run=latest", "out=mine.html"]) == 0
    assert "Training has not ended" in (tmp_path / "mine.html").read_text()
    assert capsys.readouterr().out.splitlines() == [f"page: {run.path / 'report.html'}", "page: mine.html"]


def test_a_page_is_written_anew_but_no_other_file_is(make, tmp_path):
    make("mine", finished=True)
    place = tmp_path / "own.html"
    place.write_text("<p>mine</p>")
    with pytest.raises(RecipeError) as caught:
        report("latest", place)
    (problem,) = caught.value.problems
    assert problem.what == f"{place} was not written by qlora-kit and stays as it is"
    assert (problem.where, problem.fix) == (f"out={place}", f"out={tmp_path / 'own-report.html'}")
    assert place.read_text() == "<p>mine</p>"
    assert report("latest") == report("latest")


def test_the_page_of_a_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = RunDirectory(tmp_path / "outputs" / "mine" / "1")
    made.path.mkdir(parents=True)
    made.export_recipe.write_text(recipe_yaml(compose_unchecked("export", ["base=models/mine", "export=gguf_q8_0"])))
    for words in (["base=latest"], ["base=models/mine"], [f"base={made.path}", "out=mine.html"]):
        assert report_verb(words) == 0
    assert "A base that was never trained" in (made.path / "report.html").read_text()
    assert "Nothing was trained here" in (tmp_path / "mine.html").read_text()
    assert capsys.readouterr().out.splitlines()[2] == "page: mine.html"
    with pytest.raises(RecipeError, match="it holds exports of a base model"):
        any_run(str(made.path))


def test_a_folder_is_no_place(make, tmp_path):
    make("mine", finished=True)
    (tmp_path / "pages.html").mkdir()
    with pytest.raises(RecipeError, match="is a folder") as caught:
        report("latest", tmp_path / "pages.html")
    assert caught.value.problems[0].fix == f"out={tmp_path / 'pages.html' / 'report.html'}"


def test_a_folder_without_a_recipe_is_no_run(make, tmp_path):
    with pytest.raises(RecipeError, match="nowhere is not a run directory: it holds no recipe"):
        any_run("nowhere")
    with pytest.raises(RecipeError, match=r"there is no run below outputs/\n"):
        any_run("latest")


def test_exports_of_a_base_are_pointed_to_where_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "outputs" / "mine" / "1"
    made.mkdir(parents=True)
    (made / "export.yaml").write_text("base: x\n")
    for call in (lambda: any_run("latest"), lambda: open_idle_run("latest")):
        with pytest.raises(RecipeError, match="run below outputs/, but there are exports of a base") as caught:
            call()
        assert caught.value.problems[0].fix == "base=latest, for outputs/mine/1"


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (["latest"], "report knows run=, base= and out=, but not 'latest'", "run=latest"),
        (["runs=latest"], "report knows run=, base= and out=, but not 'runs=latest'", "run=latest"),
        (["bse=here"], "report knows run=, base= and out=, but not 'bse=here'", "base=here"),
        (["zzz=here"], "report knows run=, base= and out=, but not 'zzz=here'", "qlora-kit report --help"),
        (
            ["run=a", "base=b"],
            "run=a and base=b are both set; one page is of a trained run or of a base",
            "run=a, or base=b, not both",
        ),
        (["out=page.txt"], "out must name an HTML file, got page.txt", "out=report.html"),
        (["out="], "out must name an HTML file, got nothing", "out=report.html"),
    ],
)
def test_a_wrong_line_is_told(words, what, fix):
    with pytest.raises(RecipeError) as caught:
        report_verb(words)
    (problem,) = caught.value.problems
    assert (problem.what, problem.fix) == (what, fix)
