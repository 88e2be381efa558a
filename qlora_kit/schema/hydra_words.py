"""Settings of Hydra on the command line: those of sweeps, and none that runs code or moves files."""

import re
from typing import Any

from qlora_kit.core.errors import Problem
from qlora_kit.core.extras import EXTRA_OF_MODULE, install_line, is_present
from qlora_kit.schema.trust import CODE_KEYS, HYDRA_OPTIONS, unsafe_references
from qlora_kit.schema.words import Word

ALLOWED = ("hydra.sweep.dir", "hydra.launcher", "hydra.sweeper")
_HINTS = {
    "hydra.job.env_set": "; set it before the command: NAME=value qlora-kit train ..",
    "hydra.run.dir": "; a run is written below outputs/, into the folder that name says",
}
# Option -> the module that has it
PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}


def hydra_problem(word: Word) -> Problem | None:
    """What is wrong with a word for Hydra itself, if anything."""
    key, value = word.override.key_or_group, word.override.value()
    if "/" in key:
        return _option_problem(key, value, word)
    if any(key == one or key.startswith(f"{one}.") for one in ALLOWED) and not _is_code(key, value):
        return None
    hint = next((hint for start, hint in _HINTS.items() if key.startswith(start)), "")
    what = f"{key} is no setting of a recipe; of Hydra there are {', '.join(ALLOWED)} and what is below them{hint}"
    return Problem(what, word.where)


def missing_plugin(error: Exception) -> Problem | None:
    """The pip line of a launcher or sweeper that is not installed, if that is what an error says."""
    match = re.search(r"'hydra/(?:launcher|sweeper)/(\w+)'", str(error))
    if match is None or match[1] not in PLUGINS or is_present(PLUGINS[match[1]]):
        return None
    what = f"{match[1]} needs the package '{PLUGINS[match[1]].split('.')[1]}', which is not installed"
    return Problem(what, "the command line", install_line(EXTRA_OF_MODULE[PLUGINS[match[1]]]))


def _option_problem(group: str, option: Any, word: Word) -> Problem | None:
    known = HYDRA_OPTIONS.get(group)
    if known is not None and option in known:
        return None
    what = f"there is no {group} named '{option}'" if known else f"{group} is no choice of a recipe"
    return Problem(what + (f"\n  known    {', '.join(known)}" if known else ""), word.where)


def _is_code(key: str, value: Any) -> bool:
    parts = [*key.split("."), *_names(value)]
    return any(part in CODE_KEYS or part == "custom_search_space" for part in parts) or bool(
        unsafe_references(str(value))
    )


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for key, part in value.items() for name in (str(key), *_names(part))]
    return [name for part in value for name in _names(part)] if isinstance(value, list) else []
