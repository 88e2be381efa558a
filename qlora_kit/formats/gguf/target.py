"""A GGUF file, or several that belong together, as a recipe asks for them."""

from pathlib import Path

from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.formats.gguf.converter.convert import Conversion
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gguf.writer import GgufChoices, planned_files, write_gguf
from qlora_kit.schema.export import GgufTarget

_BYTES_PER_GB = 1e9


def gguf_file_name(merged: Path, target: GgufTarget, model_name: str, conversion: Conversion | None = None) -> str:
    """Name of the file that a reader is given; the first of several names how many there are.

    A mix that a budget of bits takes the place of says so, since readers of file names take it for the mix.

    Args:
        conversion: of the merged model, which is needed to split one that the kit has no rules for.

    Raises:
        RecipeError, RunError: the model cannot be split because it cannot be written; see `write_gguf`.
    """
    whole = _whole_name(target, model_name)
    if target.shard_gb is None:
        return whole
    choices = _choices(target)
    return planned_files(merged, Path(whole), choices, has_imatrix=target.imatrix, conversion=conversion)[0].name


def write_gguf_target(
    merged: Path,
    target: GgufTarget,
    model_name: str,
    imatrix: ImportanceMatrix,
    out: Path,
    conversion: Conversion | None = None,
) -> Uncalibrated | None:
    """Write the files of a target into a folder.

    Args:
        merged: folder of the merged 16-bit model.
        target: what to write.
        model_name: first part of the files' names, and the model's name in the metadata.
        imatrix: used where the target says so; measured when the first target needs it.
        out: the folder.
        conversion: of the merged model, shared by the targets.

    Returns:
        what the importance matrix holds nothing for; None without one.

    Raises:
        RecipeError, RunError: as `write_gguf`.
    """
    file = out / _whole_name(target, model_name)
    fitted = imatrix if target.imatrix else None
    made = write_gguf(merged, file, _choices(target), name=model_name, imatrix=fitted, conversion=conversion)
    return made.uncalibrated


def _whole_name(target: GgufTarget, model_name: str) -> str:
    budget = "" if target.bits_budget is None else f"-{target.bits_budget:g}bits"
    return f"{model_name}.{target.mix.value}{budget}.gguf"


def _choices(target: GgufTarget) -> GgufChoices:
    shard_bytes = None if target.shard_gb is None else int(target.shard_gb * _BYTES_PER_GB)
    return GgufChoices(target.mix.value, dict(target.overrides), shard_bytes)
