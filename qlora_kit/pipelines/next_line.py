"""The line that comes after a training."""

from pathlib import Path
from typing import cast

from qlora_kit.core.errors import KitError
from qlora_kit.core.rundir import RunDirectory
from qlora_kit.core.shell import override, shell_line
from qlora_kit.export.fit.whole import fit_of
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.root import ExportRecipe


def line_to_export(run: RunDirectory, base_folder: Path) -> str:
    """The line that exports a run: as GGUF where its family and this installation can, else as merged weights."""
    words = [override("run", run.path), "export=gguf_q4_k_m"]
    try:
        recipe = cast(ExportRecipe, compose_recipe("export", words).recipe)
        can = not fit_of(base_folder, recipe.export).problems
    except KitError:
        can = False
    return shell_line(["qlora-kit", "export", words[0], words[1] if can else "export=merged_16bit"])
