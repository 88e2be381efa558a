"""Of Hydra's settings a command line takes those of sweeps; a folder's name stays below outputs/."""

import pytest

from qlora_kit.core import extras
from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.check import check, is_plain_name
from qlora_kit.schema.compose import compose_unchecked
from qlora_kit.schema.export import ExportConfig, GgufTarget
from qlora_kit.schema.root import ExportRecipe, TrainRecipe

LINE = ["model=demo", "data=rows", "data.train_file=rows.jsonl", "data.max_tokens=64"]


def told(*words):
    with pytest.raises(RecipeError) as caught:
        compose_unchecked("train", [*LINE, *words])
    (problem,) = caught.value.problems
    return problem


@pytest.mark.slow
@pytest.mark.skipif(not extras.is_present("hydra_plugins.hydra_joblib_launcher"), reason="needs the extra sweep")
def test_what_sweeps_need_composes():
    plain = compose_unchecked("train", LINE)
    parallel = ["launcher=joblib", "hydra.launcher.n_jobs=3", "hydra.sweep.dir=x"]
    sampled = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra/sweeper/sampler=random"]
    for words in (parallel, sampled):  # they are Hydra's own, and leave each job's recipe as it is
        assert compose_unchecked("train", [*LINE, *words]) == plain


@pytest.mark.parametrize(
    "word",
    [
        "hydra.searchpath=[pkg://os]",
        "+hydra.callbacks.x._target_=os.getcwd",
        "hydra.output_subdir=/tmp/x",
        "hydra.run.dir=/tmp/x",
        "hydra.sweep.subdir=../x",
        "hydra.job.chdir=true",
        "+hydra.job.env_set.HF_TOKEN=secret",
        "hydra/job_logging=default",
        "+hydra/callbacks=x",
        "hydra.launcher._target_=os.getcwd",
        "+hydra.sweeper.custom_search_space=os.getcwd",
        "+hydra.launcher.x={_target_: os.getcwd}",
        "hydra.sweep.dir='${oc.env:HOME}'",
        "hydra=x",
    ],
)
def test_what_runs_code_or_moves_files_is_refused_by_name(word):
    problem = told(word)
    assert word.lstrip("+").split("=")[0].split(".")[0] in problem.what
    assert problem.where.startswith("command line: ")


def test_the_environment_is_set_before_the_command():
    assert told("+hydra.job.env_set.A=b").what.endswith("set it before the command: NAME=value qlora-kit train ..")


@pytest.mark.slow
@pytest.mark.parametrize("word", ["launcher=joblib", "launcher=slurm", "hydra/sweeper=optuna"])
def test_a_launcher_that_is_not_installed_is_told_with_its_pip_line(monkeypatch, word):
    from hydra.core.config_store import ConfigStore

    repository = dict(ConfigStore.instance().repo["hydra"])
    without = {**repository, "launcher": {}, "sweeper": {"basic.yaml": repository["sweeper"]["basic.yaml"]}}
    without["launcher"] = {"basic.yaml": repository["launcher"]["basic.yaml"]}
    monkeypatch.setitem(ConfigStore.instance().repo, "hydra", without)
    monkeypatch.setattr("qlora_kit.schema.hydra_words.is_present", lambda module: False)
    problem = told(word)
    assert "which is not installed" in problem.what
    assert problem.fix.startswith("pip install") and "[sweep]" in problem.fix


def test_a_module_of_a_package_that_is_not_there_is_absent():
    assert not extras.is_present("no_such_package.part")


@pytest.mark.parametrize(
    "name",
    ["../up", "/abs", "..", ".", "", "a//b", "a/../b", "a/b/c/d", ".h", "a\nb", "a\x1b[2J", "x" * 101, "a "],
)
def test_a_name_that_is_no_folder_below_outputs(name):
    assert "name" in [issue.path for issue in check(TrainRecipe(name=name))]


@pytest.mark.parametrize("name", ["run", "a/b/c", "it's", "é漢", "$(touch x)", "a b", "-rf"])
def test_names_of_folders(name):
    assert "name" not in [issue.path for issue in check(TrainRecipe(name=name))]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", ".x"])
def test_an_export_is_one_folder(name):
    assert not is_plain_name(name)
    found = check(ExportRecipe(export=ExportConfig(gguf={name: GgufTarget()})))
    assert any("is no plain name of one" in issue.what for issue in found)
