"""The lines that come after a training, a sweep, an export and an evaluation."""

from collections.abc import Sequence
from pathlib import Path

from qlora_kit.core.errors import KitError
from qlora_kit.core.shell import hydra_value, override, shell_line
from qlora_kit.export.manifest import read_manifest
from qlora_kit.formats.checks import check_exports
from qlora_kit.formats.registry import find_format
from qlora_kit.model.source import locate_base
from qlora_kit.runs.best_job import best_job
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.compose import compose_recipe, load_recipe


def line_to_export(run: RunDirectory, base_folder: Path, wished: Sequence[str] = ()) -> str:
    """The line that exports a run: for llama.cpp where its family and this installation can, else as merged weights.

    Args:
        wished: what its recipe says that it is to become, which was checked before it was trained.
    """
    if wished:
        option = wished[0] if len(wished) == 1 else hydra_value(list(wished))
        return shell_line(["qlora-kit", "export", override("run", run.path), f"export={option}"])
    words = [override("run", run.path), "export=gguf_q4_k_m"]
    try:
        recipe = compose_recipe("export", words).recipe
        can = not check_exports(base_folder, recipe.export).problems
    except KitError:
        can = False
    return shell_line(["qlora-kit", "export", words[0], words[1] if can else "export=merged_16bit"])


def line_to_report(directory: RunDirectory) -> str:
    """The line that writes the page of a run, or of the exports of a base."""
    key = "run" if directory.recipe.is_file() else "base"
    return shell_line(["qlora-kit", "report", override(key, directory.path)])


def lines_after_export(directory: RunDirectory, files: Sequence[Path]) -> list[str]:
    """The lines that talk to the first file that `chat` opens by itself, and that write the page.

    Args:
        files: folders of files that were not rejected and whose model can be talked to.
    """
    # An adapter is talked to as its run.
    talks = [folder for folder in files if not find_format(read_manifest(folder)["format"]).needs_base]
    return [*(shell_line(["qlora-kit", "chat", folder]) for folder in talks[:1]), line_to_report(directory)]


def line_to_export_best(sweep: Path) -> str:
    """The line that exports the best job of a sweep; empty where no job finished, or its base is not there any more."""
    best = best_job(sweep)
    if best is None:
        return ""
    run = RunDirectory(best)
    try:
        recipe = load_recipe("train", run.recipe)
        base_folder = locate_base(recipe.model)
    except KitError:
        return ""
    return line_to_export(run, base_folder, recipe.exports)
