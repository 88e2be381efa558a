"""The harness is asked as its documentation says; a stand-in for the package records how."""

import importlib.machinery
import sys
import types

import pytest

from qlora_kit.core import extras
from qlora_kit.core.errors import RecipeError
from qlora_kit.evaluation.harness import harness_tasks, require_harness, run_harness

TASK = "# mine\ntask: my_task  # a comment\ndataset_path: json\nprocess_docs: !function code.docs\n"
GROUP = "group: both\ntask:\n  - my_task\n  - other\n"


class Manager:
    known = ("arc_easy", "my_task")

    def __init__(self, include_path=None, include_defaults=True):
        self.include_path, self.include_defaults = include_path, include_defaults

    def match_tasks(self, names):
        return [name for name in names if name in self.known]


class Wrapper:
    def __init__(self, **settings):
        self.settings = settings


@pytest.fixture
def harness(monkeypatch):
    """lm_eval with the parts that its documented interface names; `asked` holds the call."""
    found = {
        "my_task": {
            "alias": "my_task",
            "sample_len": 8,
            "acc,none": 0.75,
            "acc_stderr,none": 0.1,
            "f1,none": float("nan"),
            "bleu_stderr,none": "N/A",
        }
    }
    package = types.ModuleType("lm_eval")
    asked = []
    vars(package).update(asked=asked, simple_evaluate=lambda **settings: asked.append(settings) or {"results": found})
    modules = {"lm_eval": package, "lm_eval.models": types.ModuleType("lm_eval.models")}
    modules["lm_eval.models.huggingface"] = types.ModuleType("lm_eval.models.huggingface")
    vars(modules["lm_eval.models.huggingface"])["HFLM"] = Wrapper
    modules["lm_eval.tasks"] = types.ModuleType("lm_eval.tasks")
    vars(modules["lm_eval.tasks"])["TaskManager"] = Manager
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return package


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.yaml").write_text(TASK)
    (tmp_path / "b.yml").write_text("task: 'other'\n")
    (tmp_path / "both.yaml").write_text(GROUP)
    (tmp_path / "code.py").write_text("task: nothing\n")
    return tmp_path


def test_names_files_and_folders(folder):
    assert harness_tasks(["arc_easy"]).__dict__ == {"names": ["arc_easy"], "folders": [], "needs_its_own": True}
    file = harness_tasks([str(folder / "a.yaml")])
    assert (file.names, file.folders, file.needs_its_own) == (["my_task"], [str(folder)], False)
    assert harness_tasks([str(folder / "both.yaml")]).names == ["both"]
    everything = harness_tasks(["arc_easy", str(folder), str(folder / "b.yml")])
    assert everything.names == ["arc_easy", "my_task", "other"]
    assert (everything.folders, everything.needs_its_own) == ([str(folder)], True)


def test_a_task_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the task file .*absent.yaml: No such file"):
        harness_tasks([str(tmp_path / "absent.yaml")])
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    for entry in (tmp_path, tmp_path / "empty.yaml"):
        with pytest.raises(RecipeError, match="names no task: a task file has a line such as 'task: my_task'"):
            harness_tasks([str(entry)])


def test_the_model_is_wrapped_and_the_numbers_come_back(harness, folder):
    tasks = harness_tasks([str(folder / "a.yaml")])
    assert run_harness("model", "tokenizer", tasks, 4, 8) == {"my_task": {"acc,none": 0.75, "acc_stderr,none": 0.1}}
    (asked,) = harness.asked
    assert asked["model"].settings == {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 4}
    assert (asked["tasks"], asked["limit"], asked["log_samples"]) == (["my_task"], 8, False)
    assert asked["task_manager"].include_path == [str(folder)]
    assert asked["task_manager"].include_defaults is False


def test_the_harness_looks_through_its_own_tasks_only_for_a_name(harness):
    run_harness("model", "tokenizer", harness_tasks(["arc_easy"]), 1, None)
    manager = harness.asked[0]["task_manager"]
    assert (manager.include_path, manager.include_defaults) == (None, True)


def test_a_task_that_the_harness_does_not_know(harness):
    with pytest.raises(RecipeError, match="lm-eval knows no task named arc_hard, mmlu2") as caught:
        run_harness("model", "tokenizer", harness_tasks(["arc_hard", "arc_easy", "mmlu2"]), 1, None)
    assert "eval.lm_eval" in str(caught.value)
    assert harness.asked == []


def test_without_the_harness_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(extras.EXTRA_OF_MODULE, "lm_eval", "harness")
    monkeypatch.setattr(extras, "is_present", lambda module: False)
    needs = r"eval\.lm_eval needs the package 'lm_eval', which is not installed"
    with pytest.raises(RecipeError, match=needs) as caught:
        require_harness()
    assert extras.install_line("harness") in str(caught.value)
    with pytest.raises(RecipeError, match=needs):
        run_harness("model", "tokenizer", harness_tasks(["arc_easy"]), 1, None)
