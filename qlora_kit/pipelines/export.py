"""Export: one 16-bit model, any number of files from it, each compared with what it is made from before it counts."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_kit.adapter.saved import CONFIG
from qlora_kit.core.console.lines import log
from qlora_kit.core.console.session import log_to
from qlora_kit.core.errors import KitError, Problem, RecipeError
from qlora_kit.core.files import clear_left_overs, file_part, read_json, remove, size_on_disk, staged_directory
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.core.lock import hold
from qlora_kit.core.units import counted, human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.exported import Exported
from qlora_kit.evaluation.judge import Baselines
from qlora_kit.evaluation.reference import Reference, open_models
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.export.manifest import record_bases
from qlora_kit.export.merge import MergeReport
from qlora_kit.export.rows import rows_of_export
from qlora_kit.export.sixteen_bit import write_sixteen_bit
from qlora_kit.formats.checks import refuse_unfit
from qlora_kit.formats.exported import raise_what_went_wrong
from qlora_kit.formats.finish import TOP_TOKENS, Finished, finish
from qlora_kit.formats.job import ExportJob, ExportSource, Written
from qlora_kit.formats.merge_bases import base_for, merge_bases
from qlora_kit.formats.next_line import lines_after_export
from qlora_kit.formats.registry import export_jobs, find_format
from qlora_kit.report.exports import print_exported
from qlora_kit.runs.directory import no_empty_folder_left
from qlora_kit.runs.left_overs import MERGED
from qlora_kit.runs.open import note_export
from qlora_kit.runs.run import EVAL_FILE, Run
from qlora_kit.schema.export import ExportConfig, MergeBase

Merged = tuple[Path, MergeReport]  # the 16-bit folder, and what was merged into it


def export(run: Run, config: ExportConfig) -> list[Exported]:
    """Write every file that the recipe names; one that fails leaves nothing behind and the others go on.

    Raises:
        RecipeError: a setting does not fit the base, or its family has no such export.
        RunError: an export failed; the others are written.
        FidelityError: a file is further from what it is compared with than `export.max_mean_kl`; its manifest says so.
    """
    with no_empty_folder_left(run.directory.path):
        refuse_unmeasurable(run, config)
        done = _exported(run, config)
    print_exported(f"{run.directory.path}: against {run.reference}, KL in nats", done)
    if not run.holds_out:
        log.info(f"NOT MEASURED: {Problem(run.unmeasured, fix=EVAL_FILE)}")
    _tell_next(run, done)
    raise_what_went_wrong(done)
    return done


def _tell_next(run: Run, done: Sequence[Exported]) -> None:
    """Say what to do with the files that are there; of a rejected one its page tells more than its error."""
    if all(one.error for one in done):
        return
    # A file that was not scored was not opened here either, and may not open: fp8 without a GPU, say
    opened = [one.folder for one in done if one.fidelity and one.verdict is not Verdict.rejected]
    for line in lines_after_export(run.directory, opened if run.tokenizer.chat_template else []):
        log.info(f"next: {line}")


def _exported(run: Run, config: ExportConfig) -> list[Exported]:
    fit = refuse_unfit(run.base.folder, config, _adapter_settings(run))
    config = fit.export
    for name, left in fit.unquantized.items():
        log.info(f"{name}: {left}")
    for name, why in fit.impossible.items():
        log.info(f"{name}: failed: {why}")
    rows = rows_of_export(run, config)
    with _alone(run), ExitStack() as folders:
        if not run.trained:
            note_export(run, rows.origin)
        log_to(run.directory.log)
        reference = _reference(run, rows.scored) if rows.scored else None
        bases = merge_bases(run, config)
        _clear_other_merges(run, bases)
        merges = [folders.enter_context(_sixteen_bit(run, base)) for base in bases]
        jobs = [list(_jobs(config, _source(run, folder, rows.calibration), fit.unquantized)) for folder, _ in merges]
        not_begun = [
            Exported(name, run.directory.exports / name, 0.0, error=why) for name, why in fit.impossible.items()
        ]
        return not_begun + [
            _write(run, config, list(zip(same, merges, strict=True)), reference) for same in zip(*jobs, strict=True)
        ]


def refuse_unmeasurable(run: Run, config: ExportConfig) -> None:
    """Refuse settings that judge by held-out rows, where there are none.

    Raises:
        RecipeError: there is a bound, or a merge base to be measured, and nothing to measure on.
    """
    if run.holds_out:
        return
    problems = []
    if config.max_mean_kl is not None:
        what = f"export.max_mean_kl={config.max_mean_kl:g} is a bound on what is measured, and {run.unmeasured}"
        problems.append(Problem(what, "export.max_mean_kl", EVAL_FILE))
    if config.merge_base is MergeBase.best:
        what = f"export.merge_base=best compares held-out losses, and {run.unmeasured}"
        problems.append(Problem(what, "export.merge_base", EVAL_FILE))
    if problems:
        raise RecipeError(problems)


def _adapter_settings(run: Run) -> Mapping[str, Any] | None:
    settings = run.directory.adapter / CONFIG
    return read_json(settings) if run.trained and settings.is_file() else None


def _jobs(config: ExportConfig, source: ExportSource, left: Mapping[str, Unquantized]) -> Iterator[ExportJob]:
    for job in export_jobs(config, source):
        yield replace(job, unquantized=left[job.name].record()) if job.name in left else job


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Hold the exports of a run or base, and clear away what a killed export left there."""
    directory = run.directory
    directory.path.mkdir(parents=True, exist_ok=True)
    refuse_links_outside(directory.path)
    with hold(directory.path, "export"):
        directory.exports.mkdir(exist_ok=True)
        clear_left_overs(directory.exports)
        yield


def _reference(run: Run, rows: Sequence[TokenRow]) -> Reference:
    log.info(f"scoring {run.reference} on {counted(len(rows), 'held-out row')}")
    models = open_models(run)
    scores = models[run.models[-1]].score(rows, None, TOP_TOKENS)
    untrained = models["base"].score(rows, None, 1) if run.trained else None
    for scorer in models.values():
        scorer.close()
    return Reference(rows, Baselines(scores, untrained))


def _source(run: Run, sixteen_bit: Path, calibration: list[list[int]]) -> ExportSource:
    return ExportSource(sixteen_bit, run.directory.adapter, run.base.name, file_part(run.name), calibration)


def _merge_folder(run: Run, merge_base: MergeBase) -> Path:
    """Of a fixed name: after a kill, the next merge of the same inputs goes on in it."""
    return run.directory.exports / f"{MERGED}{merge_base.name}"


def _clear_other_merges(run: Run, bases: Sequence[MergeBase]) -> None:
    wanted = {_merge_folder(run, base) for base in bases}
    for left in run.directory.exports.glob(f"{MERGED}*"):
        if left not in wanted:
            remove(left)


@contextmanager
def _sixteen_bit(run: Run, merge_base: MergeBase) -> Iterator[Merged]:
    folder = _merge_folder(run, merge_base)
    folder.mkdir(exist_ok=True)
    try:
        yield folder, write_sixteen_bit(run, merge_base, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    run: Run,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
) -> Exported:
    """Write one file; from each merge, and the better one is kept."""
    name = candidates[0][0].name
    place = run.directory.exports / name
    began = time.perf_counter()
    log.info(f"{name}: writing")
    try:
        with staged_directory(place) as folder:
            found = _best(run, config, candidates, reference, folder)
    except Exception as error:
        kind = "" if isinstance(error, KitError) else f"{type(error).__name__}: "
        log.info(f"{name}: failed: {kind}{error}")
        return Exported(name, place, time.perf_counter() - began, error=f"{kind}{error}")
    kl = f", mean KL {found.fidelity.mean_kl:.4f}" if found.fidelity else ""
    log.info(f"{name}: {human_bytes(size_on_disk(place))} in {human_seconds(found.seconds)}{kl}, {found.verdict.shown}")
    return Exported(name, place, found.seconds, found.fidelity, found.verdict, found.faults)


def _best(
    run: Run,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
    folder: Path,
) -> Finished:
    candidates = _chosen(run, config, candidates)
    job, merged = candidates[0]
    if len(candidates) == 1 or find_format(job.format).needs_base:
        return _made(run, config, job, merged, reference, folder)
    found: dict[str, tuple[Path, Finished]] = {}
    with ExitStack() as folders:
        for job, merged in candidates:
            made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{job.name}.", suffix=".partial")
            made_folder = Path(folders.enter_context(made)) / "made"
            made_folder.mkdir()
            found[merged[1].base] = made_folder, _made(run, config, job, merged, reference, made_folder)
        losses = {base: one.fidelity.loss for base, (_, one) in found.items() if one.fidelity is not None}
        best = min(losses, key=lambda base: (not math.isfinite(losses[base]), losses[base]))
        record_bases(found[best][0], losses)
        folder.rmdir()
        found[best][0].rename(folder)
    log.info(f"{job.name}: held-out loss by base: {', '.join(f'{base} {loss:.4f}' for base, loss in losses.items())}")
    return found[best][1]


def _chosen(
    run: Run, config: ExportConfig, candidates: Sequence[tuple[ExportJob, Merged]]
) -> Sequence[tuple[ExportJob, Merged]]:
    """The merges that a file is made from: what auto names, else all."""
    if config.merge_base is not MergeBase.auto or len(candidates) == 1:
        return candidates
    job = candidates[0][0]
    wanted = base_for(run, find_format(job.format).rounds_to(job.settings))
    return [one for one in candidates if one[1][1].base == wanted.name] or candidates[:1]


def _made(
    run: Run,
    config: ExportConfig,
    job: ExportJob,
    merged: Merged,
    reference: Reference | None,
    folder: Path,
) -> Finished:
    began = time.perf_counter()
    written = job.write(folder) or Written()
    seconds = time.perf_counter() - began
    if written.uncalibrated:
        log.info(f"{job.name}: {written.uncalibrated}")
    return finish(run, job, folder, merged, reference, config.max_mean_kl, seconds, written)
