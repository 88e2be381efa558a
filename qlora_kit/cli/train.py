"""`qlora-kit train`: one run, a resumed run, or a sweep."""

import os
import sys

from qlora_kit.cli.line import Line, parse_line, run_verb_help
from qlora_kit.cli.run_name import named
from qlora_kit.core.distributed import refuse_several_processes
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.lock import hold
from qlora_kit.core.secrets import masked
from qlora_kit.core.shell import override, shell_line
from qlora_kit.runs.directory import RunDirectory, find_run, new_run
from qlora_kit.schema.check_wished import EXPORTS

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # what torch reads, and what it read before
EXAMPLES = [
    "qlora-kit train experiment=smollm2_135m_home_commands_cpu",
    "qlora-kit train experiment=llama3_1_8b_chat_24gb model.source=/models/base data.train_file=chats.jsonl",
    "qlora-kit train resume=latest",
    "qlora-kit train -m experiment=smollm2_135m_home_commands_cpu lora.r=4,16 optim.learning_rate=1e-4,1e-3",
]


def run(arguments: list[str]) -> int:
    """Train as the line says; returns the exit code."""
    line = parse_line(arguments, "resume")
    if line.wants_help:
        print(run_verb_help("train", "Fine-tune a quantized base with LoRA.", EXAMPLES))
        return EXIT_OK
    refuse_several_processes(shell_line(["qlora-kit", "train", *arguments]))
    _let_segments_grow()
    if line.value("resume") is not None:
        return _resume(line)
    if line.is_multirun:
        from qlora_kit.cli.sweep import run_sweep

        return run_sweep(line)
    return _once(line)


def _let_segments_grow() -> None:
    """Have torch's memory on a GPU grow page by page, unless the user says how; it is told so before it is imported.

    What is freed while weights are quantized, and between steps of other shapes, can then be used for anything: in
    24.7 GB of an H200, 40 of the 48 layers of a mixture of 30 billion weights kept their inputs, where none did before.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _once(line: Line) -> int:
    from qlora_kit.schema.compose import compose_recipe
    from qlora_kit.tracking.tracker import reach_services
    from qlora_kit.training.preflight import check_train

    overrides = named(line)
    composed = compose_recipe("train", overrides)
    recipe = check_train(composed)
    if recipe.exports:
        from qlora_kit.formats.wished import refuse_wishes

        refuse_wishes(recipe, composed.origins[EXPORTS])
    reach_services(recipe.tracker)

    from qlora_kit.pipelines.train import train

    with new_run(recipe.name, "train") as run_path:
        train(recipe, RunDirectory(run_path), [masked(override) for override in overrides])
    return EXIT_OK


def _resume(line: Line) -> int:
    from qlora_kit.schema.compose import Composed, load_recipe
    from qlora_kit.training.preflight import check_train

    name = line.value("resume") or ""
    found = find_run(name, finished=False)  # first: of a finished run no line without the other words would work
    others = [override for override in line.overrides if not override.startswith(("resume=", "debug="))]
    if others or line.is_multirun:
        raise RecipeError(
            f"a resumed run keeps the recipe it was started with; {' '.join([*others, *line.flags])} would change it",
            "the command line",
            shell_line(["qlora-kit", "train", override("resume", name)]),
        )
    from qlora_kit.runs.as_written import refuse_edited
    from qlora_kit.runs.job_process import end_with_sweep

    end_with_sweep()
    with hold(found.path, "train"):
        find_run(str(found.path), finished=False)  # whoever held it may have finished it
        refuse_edited(found)
        recipe = check_train(Composed(load_recipe("train", found.recipe), {}, {}))
        from qlora_kit.pipelines.train import train

        train(recipe, found, None)
    return EXIT_OK
