"""Tasks of EleutherAI's lm-evaluation-harness, run on a loaded transformers model.

Follows the harness's documented Python interface (docs/python-api.md there): an `HFLM` around the model, a
`TaskManager` that knows the folders of local tasks, and `simple_evaluate`.
"""

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.extras import require

MODULE = "lm_eval"
_YAML = (".yaml", ".yml")
_COUNTS = {"sample_len"}  # lies among a task's metrics and is none
_TASK_LINE = re.compile(r"^(task|group):[ \t]*[\"']?([\w.\-/]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
_DRAWS = 1000  # for the error of metrics that are no means; the harness's own 100,000 take minutes

TaskScores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class HarnessTasks:
    """Names that the harness is asked for, the folders of local ones, and whether it must know its own too."""

    names: list[str]
    folders: list[str]
    needs_its_own: bool


def require_harness() -> None:
    """Refuse before a model is loaded where the harness is not installed.

    Raises:
        RecipeError: it is not; the message holds the pip line.
    """
    require(MODULE, "eval.lm_eval")


def harness_tasks(wanted: Sequence[str]) -> HarnessTasks:
    """Tasks by the harness's names, by a YAML file, or by a folder of YAML files.

    Raises:
        RecipeError: a file or folder is absent or names no task.
    """
    names: list[str] = []
    folders: list[str] = []
    needs_its_own = False
    for entry in wanted:
        path = Path(entry)
        if path.suffix not in _YAML and not path.is_dir():
            names.append(entry)
            needs_its_own = True
            continue
        files = sorted(file for file in path.iterdir() if file.suffix in _YAML) if path.is_dir() else [path]
        # A folder's groups hold its tasks, which the harness refuses to run twice.
        found = [name for file in files for kind, name in _names_in(file) if kind == "task" or not path.is_dir()]
        if not found:
            what = f"{entry} names no task: a task file has a line such as 'task: my_task'"
            raise RecipeError(what, "eval.lm_eval", "eval.lm_eval=[<a YAML file of a task>]")
        names += found
        folders.append(str((path if path.is_dir() else path.parent).resolve()))
    return HarnessTasks(list(dict.fromkeys(names)), list(dict.fromkeys(folders)), needs_its_own)


def run_harness(model: Any, tokenizer: Any, tasks: HarnessTasks, batch_size: int, limit: int | None) -> TaskScores:
    """The harness's numbers for a model, by task, then by metric and filter, such as `acc,none`.

    Args:
        model: a transformers or peft model, already on its device.
        limit: rows of each task; None takes all.

    Raises:
        RecipeError: the harness is not installed, or knows no such task.
    """
    harness = require(MODULE, "eval.lm_eval")
    wrapper = importlib.import_module(f"{MODULE}.models.huggingface").HFLM
    known = importlib.import_module(f"{MODULE}.tasks").TaskManager(
        include_path=tasks.folders or None, include_defaults=tasks.needs_its_own
    )
    unknown = [name for name in tasks.names if not known.match_tasks([name])]
    if unknown:
        what = f"lm-eval knows no task named {', '.join(unknown)}"
        raise RecipeError(what, "eval.lm_eval", "eval.lm_eval=[<a name of `lm-eval ls tasks`, or a YAML file>]")
    found = harness.simple_evaluate(
        model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks.names,
        task_manager=known,
        limit=limit,
        log_samples=False,
        bootstrap_iters=_DRAWS,
    )
    return {name: _numbers(metrics) for name, metrics in found["results"].items()}


def _names_in(file: Path) -> list[tuple[str, str]]:
    """Read line by line: these files hold tags of the harness's own that a YAML reader does not know."""
    try:
        return _TASK_LINE.findall(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"cannot read the task file {file}: {error.strerror}"
        raise RecipeError(what, "eval.lm_eval", "eval.lm_eval=[<a YAML file of a task>]") from error


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """Metrics alone: beside them lie names, and 'N/A' where an error cannot be told."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name not in _COUNTS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
