"""Which base an adapter is merged into for each file."""

from qlora_kit.formats.job import settings_of
from qlora_kit.formats.registry import requested
from qlora_kit.runs.run import Run
from qlora_kit.schema.export import ExportConfig, MergeBase
from qlora_kit.schema.quant import QuantKind


def merge_bases(run: Run, config: ExportConfig) -> list[MergeBase]:
    """The 16-bit models that files are made from; of several, `base_for` chooses for each file or the scores do."""
    if not run.trained:
        return [MergeBase.original]
    if config.merge_base is MergeBase.auto:
        wanted = {base_for(run, one.format.rounds_to(settings_of(one.target))) for one in requested(config)}
        return [base for base in (MergeBase.dequantized, MergeBase.original) if base in wanted]
    if config.merge_base is not MergeBase.best:
        return [config.merge_base]
    if run.quant.kind is QuantKind.none:
        return [MergeBase.original]  # it was trained on the 16-bit base: there is one candidate
    return [MergeBase.dequantized, MergeBase.original]


def base_for(run: Run, rounds_to: str | None) -> MergeBase:
    """What a file of a trained run is made from by `export.merge_base=auto`.

    The values of a base in 4 or 8 bit are those that the same format rounds to, so most of an update that is added
    to them and rounded again falls back to the base.

    Args:
        rounds_to: the `quant.kind` whose values the file rounds to; None for a grid of its own.
    """
    return MergeBase.original if rounds_to == run.quant.kind.value else MergeBase.dequantized
