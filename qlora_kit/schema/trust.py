"""What a recipe file may not hold, whoever wrote it: anything that could do more than set values of a recipe."""

import re
from collections.abc import Iterator

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit.core.errors import Problem
from qlora_kit.core.terminal import printable
from qlora_kit.schema import walk
from qlora_kit.schema.folders import groups
from qlora_kit.schema.recipe_text import Entry, RecipeText
from qlora_kit.schema.root import RECIPE_OF_VERB

# What Hydra instantiates
CODE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
HYDRA_OPTIONS = {
    "hydra/launcher": ("basic", "joblib", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("basic", "optuna"),
    "hydra/sweeper/sampler": ("tpe", "random", "cmaes", "nsgaii", "motpe", "grid", "qmc"),
    "hydra/job_logging": ("disabled",),
    "hydra/hydra_logging": ("disabled",),
}
_LAUNCHER = (
    *("n_jobs", "batch_size", "verbose", "timeout", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node"),
    *("mem_gb", "nodes", "name", "stderr_to_stdout", "partition", "qos", "comment", "constraint", "exclude", "gres"),
    *("cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu", "account", "signal_delay_s", "max_num_timeout"),
    "array_parallelism",
)
_SWEEPER = ("n_trials", "n_jobs", "max_failure_rate", "direction", "study_name", "max_batch_size")
_SAMPLER = ("seed", "n_startup_trials", "n_ei_candidates", "multivariate", "population_size", "mutation_prob")
_HYDRA_FIELDS = {
    *(f"hydra.launcher.{name}" for name in _LAUNCHER),
    *(f"hydra.sweeper.{name}" for name in _SWEEPER),
    *(f"hydra.sweeper.sampler.{name}" for name in _SAMPLER),
    "hydra.job.name",
}
_HYDRA_PARTS = {field.rsplit(".", length)[0] for field in _HYDRA_FIELDS for length in (1, 2)} | {"hydra.sweeper.params"}
_HYDRA_CONSTANTS = {"hydra.output_subdir": "null", "hydra.job.chdir": "false"}
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*(\$\{(?:([A-Za-z_][\w.]*)\})?)")
_PLAIN = re.compile(r"[\w .,:/@%+=|&()\[\]-]{0,200}")


def refusals(found: RecipeText, package: tuple[str, ...]) -> Iterator[Problem]:
    """What a file holds that is not a plain value of a recipe.

    Args:
        found: the file.
        package: the path of the recipe that its keys are below.
    """
    if package[:1] == ("hydra",):
        yield Problem(f"{found.shown} holds settings of Hydra, which a recipe may not", found.place(1))
        return
    for entry in found.entries():
        where = found.place(entry.line)
        path = (*package, *entry.path)
        if entry.key is not None and entry.key in CODE_KEYS:
            what = f"{found.shown} names code to run with '{entry.key}'; a recipe holds values only"
            yield Problem(what, where)
        elif path[0].split(".")[0] == "hydra":
            yield from _hydra_refusal(found, entry, ".".join(path))
        if entry.key is not None and "${" in entry.key:
            yield Problem(f"{found.shown} has the key '{printable(entry.key)}', which is no name", where)
        if isinstance(entry.node, yaml.ScalarNode):
            yield from _reference_refusals(found, entry)


def unsafe_references(text: str) -> list[str]:
    """Each `${` of a text that is not the plain path of a recipe's field."""
    return [
        text[match.start(1) : match.start(1) + 40]
        for match in _REFERENCE.finditer(text)
        if not match[2] or not any(walk.find_path(root, match[2]) for root in RECIPE_OF_VERB.values())
    ]


def _reference_refusals(found: RecipeText, entry: Entry) -> Iterator[Problem]:
    for reference in unsafe_references(entry.node.value):
        what = (
            f"{found.shown} looks up '{printable(reference)}'; a recipe may look up its own fields only, such as "
            "${lora.r}, and no environment, function or file"
        )
        yield Problem(what, found.place(entry.line))


def _hydra_refusal(found: RecipeText, entry: Entry, path: str) -> Iterator[Problem]:
    if entry.key is None and not isinstance(entry.node, yaml.ScalarNode):
        yield Problem(f"{found.shown} gives a list to {path}, which a recipe may not", found.place(entry.line))
        return
    if path == "hydra" or path in _HYDRA_PARTS:
        if isinstance(entry.node, yaml.MappingNode):
            return
    elif path in _HYDRA_CONSTANTS:
        if str(entry.node.value).lower() == _HYDRA_CONSTANTS[path]:
            return
    elif path in _HYDRA_FIELDS:
        if isinstance(entry.node, yaml.ScalarNode) and _PLAIN.fullmatch(entry.node.value):
            return
    elif path.startswith("hydra.sweeper.params."):
        swept = path.removeprefix("hydra.sweeper.params.")
        is_ours = walk.find_path(RECIPE_OF_VERB["train"], swept) or swept in groups()
        if is_ours and isinstance(entry.node, yaml.ScalarNode):
            return
    what = f"{found.shown} sets {printable(path)}, which is a setting of Hydra that a recipe file may not give"
    yield Problem(what, found.place(entry.line))
