"""Export: one merge, any number of files, each compared with the trained model before it counts."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.errors import FidelityError, KitError, RecipeError, RunError
from qlora_kit.core.files import clear_left_overs, size_on_disk, staged_directory
from qlora_kit.core.say import say
from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.data.prepare import PreparedData
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.artifacts import ADAPTERS, open_trained
from qlora_kit.evaluation.scores import Fidelity
from qlora_kit.export.calibration import calibration_rows
from qlora_kit.export.manifest import record_bases
from qlora_kit.export.merge import MergeReport, merge
from qlora_kit.export.targets.adapter import BaseName
from qlora_kit.export.targets.table import ExportJob, Source, export_jobs
from qlora_kit.pipelines.finish_export import TOP_TOKENS, Finished, Reference, finish
from qlora_kit.pipelines.opened_run import OpenedRun
from qlora_kit.schema.export import ExportConfig, MergeBase
from qlora_kit.schema.quant import QuantKind

Merged = tuple[Path, MergeReport]  # the 16-bit folder, and what was merged


@dataclass(frozen=True)
class Exported:
    """How an export ended."""

    name: str
    folder: Path
    seconds: float
    fidelity: Fidelity | None = None
    faults: tuple[str, ...] = ()
    error: str = ""


def export(opened: OpenedRun, config: ExportConfig) -> list[Exported]:
    """Write every file that the recipe names; one that fails leaves nothing behind and the others go on.

    Raises:
        RunError: an export failed; the others are written.
        FidelityError: a file is further from the trained model than `export.max_mean_kl`; its manifest says so.
    """
    data = opened.rows()
    rows = data.scored(config.score_rows)
    with _alone(opened), ExitStack() as folders:
        reference = _reference(opened, rows) if rows else None
        calibration = _calibration(opened, data, config)
        merges = [folders.enter_context(_merged(opened, base)) for base in _bases(opened, config, reference)]
        jobs = [list(export_jobs(config, _source(opened, folder, calibration))) for folder, _ in merges]
        done = [
            _write(opened, config, list(zip(same, merges, strict=True)), reference) for same in zip(*jobs, strict=True)
        ]
    failed = [export for export in done if export.error]
    rejected = [export for export in done if export.faults]
    if failed:
        raise RunError("\n".join(f"{export.name} was not written: {export.error}" for export in failed))
    if rejected:
        raise FidelityError(
            "\n".join(f"{export.name} is rejected: {fault}" for export in rejected for fault in export.faults),
            fix="for KL: more bits or smaller groups, more export.calibration_rows, or a higher export.max_mean_kl",
        )
    return done


@contextmanager
def _alone(opened: OpenedRun) -> Iterator[None]:
    """Hold the run's exports, and clear away what a killed export left there."""
    from filelock import FileLock, Timeout

    lock = FileLock(opened.directory.path / ".export.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            "another export of this run is at work", str(opened.directory.exports), "wait for it, or stop it"
        ) from None
    try:
        opened.directory.exports.mkdir(exist_ok=True)
        clear_left_overs(opened.directory.exports)
        yield
    finally:
        lock.release()


def _reference(opened: OpenedRun, rows: Sequence[TokenRow]) -> Reference:
    say(f"scoring the trained model on {len(rows)} held-out rows")
    recipe = opened.recipe
    trained, _ = open_trained(
        opened.base_folder, opened.directory.adapter, recipe.quant, int(opened.tokenizer.pad_token_id)
    )
    scores = trained.score(rows, None, TOP_TOKENS)
    trained.close()
    return Reference(rows, scores)


def _source(opened: OpenedRun, merged: Path, calibration: list[list[int]]) -> Source:
    model = opened.recipe.model
    return Source(
        merged, opened.directory.adapter, BaseName(model.source, model.revision), opened.recipe.name, calibration
    )


def _bases(opened: OpenedRun, config: ExportConfig, reference: Reference | None) -> list[MergeBase]:
    if config.merge_base is not MergeBase.measure:
        return [config.merge_base]
    if reference is None:
        raise RecipeError(
            "export.merge_base=measure compares held-out losses, and this run has no held-out rows",
            "export.merge_base",
            "export.merge_base=dequantized",
        )
    if opened.recipe.quant.kind is QuantKind.none:
        return [MergeBase.original]  # it was trained on the 16-bit base: there is one candidate
    return [MergeBase.dequantized, MergeBase.original]


@contextmanager
def _merged(opened: OpenedRun, merge_base: MergeBase) -> Iterator[Merged]:
    began = time.perf_counter()
    exports = opened.directory.exports
    with tempfile.TemporaryDirectory(dir=exports, prefix=".merged.", suffix=".partial") as folder:
        adapter = opened.directory.adapter
        report = merge(opened.base_folder, adapter, opened.recipe.quant, merge_base, opened.tokenizer, Path(folder))
        seconds = human_seconds(time.perf_counter() - began)
        say(f"merged {report.merged} of {report.adapted} modules into the {report.base} base in {seconds}")
        yield Path(folder), report


def _calibration(opened: OpenedRun, data: PreparedData, config: ExportConfig) -> list[list[int]]:
    return calibration_rows(
        data.train,
        config.calibration_rows,
        held_out=data.held_out,
        tokenizer=opened.tokenizer,
        general_share=config.calibration_general,
        seed=opened.recipe.trainer.seed,
    )


def _write(
    opened: OpenedRun,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
) -> Exported:
    """Write one file; from each merge, and the better one is kept."""
    name = candidates[0][0].name
    place = opened.directory.exports / name
    began = time.perf_counter()
    say(f"{name}: writing")
    try:
        with staged_directory(place) as folder:
            found = _best(opened, config, candidates, reference, folder)
    except Exception as error:
        kind = "" if isinstance(error, KitError) else f"{type(error).__name__}: "
        say(f"{name}: failed: {kind}{error}")
        return Exported(name, place, time.perf_counter() - began, error=f"{kind}{error}")
    kl = f", mean KL {found.fidelity.mean_kl:.4f}" if found.fidelity else ""
    state = " REJECTED" if found.faults else ""
    say(f"{name}: {human_bytes(size_on_disk(place))} in {human_seconds(found.seconds)}{kl}{state}")
    return Exported(name, place, found.seconds, found.fidelity, found.faults)


def _best(
    opened: OpenedRun,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
    folder: Path,
) -> Finished:
    job, merged = candidates[0]
    if len(candidates) == 1 or job.format in ADAPTERS:
        return _made(opened, config, job, merged, reference, folder)
    found: dict[str, tuple[Path, Finished]] = {}
    with ExitStack() as folders:
        for job, merged in candidates:
            made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{job.name}.", suffix=".partial")
            made_folder = Path(folders.enter_context(made)) / "made"
            made_folder.mkdir()
            found[merged[1].base] = made_folder, _made(opened, config, job, merged, reference, made_folder)
        losses = {base: one.fidelity.loss for base, (_, one) in found.items() if one.fidelity is not None}
        best = min(losses, key=lambda base: losses[base])
        record_bases(found[best][0], losses)
        folder.rmdir()
        found[best][0].rename(folder)
    say(f"{job.name}: held-out loss by base: {', '.join(f'{base} {loss:.4f}' for base, loss in losses.items())}")
    return found[best][1]


def _made(
    opened: OpenedRun,
    config: ExportConfig,
    job: ExportJob,
    merged: Merged,
    reference: Reference | None,
    folder: Path,
) -> Finished:
    began = time.perf_counter()
    job.write(folder)
    return finish(opened, job, folder, *merged, reference, config.max_mean_kl, time.perf_counter() - began)
