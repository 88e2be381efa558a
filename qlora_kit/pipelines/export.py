"""Export: one 16-bit model, any number of files from it, each compared with what it is made from before it counts."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_kit.adapter.updates import CONFIG
from qlora_kit.core.console.lines import log
from qlora_kit.core.console.session import log_to
from qlora_kit.core.errors import KitError, Problem, RecipeError
from qlora_kit.core.files import clear_left_overs, file_part, read_json, remove, size_on_disk, staged_directory
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.core.lock import hold
from qlora_kit.core.units import counted, human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.judge import Yardstick
from qlora_kit.export.fit.fault import LeftOver
from qlora_kit.export.manifest import record_bases
from qlora_kit.export.merge import MergeReport
from qlora_kit.formats.fit import fit_of
from qlora_kit.formats.job import ExportJob, Source
from qlora_kit.formats.registry import export_jobs, find_format
from qlora_kit.pipelines.exportable import MERGED, Exportable
from qlora_kit.pipelines.exported import Exported, print_exported, raise_what_went_wrong
from qlora_kit.pipelines.finish_export import TOP_TOKENS, Finished, finish
from qlora_kit.pipelines.next_line import lines_after_export
from qlora_kit.pipelines.opened_run import EVAL_FILE
from qlora_kit.pipelines.reference import Reference
from qlora_kit.runs.directory import no_empty_folder_left
from qlora_kit.schema.export import ExportConfig, MergeBase

Merged = tuple[Path, MergeReport]  # the 16-bit folder, and what was merged into it


def export(subject: Exportable, config: ExportConfig) -> list[Exported]:
    """Write every file that the recipe names; one that fails leaves nothing behind and the others go on.

    Raises:
        RecipeError: a setting does not fit the base, or its family has no such export.
        RunError: an export failed; the others are written.
        FidelityError: a file is further from what it is compared with than `export.max_mean_kl`; its manifest says so.
    """
    refuse_unmeasurable(subject, config)
    with no_empty_folder_left(subject.directory.path):
        done = _exported(subject, config)
    print_exported(f"{subject.directory.path}: against {subject.reference}, KL in nats", done)
    if not subject.holds_out:
        log.info(f"NOT MEASURED: {Problem(subject.unmeasured, fix=EVAL_FILE)}")
    _tell_next(subject, done)
    raise_what_went_wrong(done)
    return done


def _tell_next(subject: Exportable, done: Sequence[Exported]) -> None:
    """Say what to do with the files that are there; of a rejected one its page tells more than its error."""
    if all(one.error for one in done):
        return
    # A file that was not scored was not opened here either, and may not open: fp8 without a GPU, say
    opened = [one.folder for one in done if one.fidelity and one.verdict is not Verdict.rejected]
    for line in lines_after_export(subject.directory, opened if subject.tokenizer.chat_template else []):
        log.info(f"next: {line}")


def _exported(subject: Exportable, config: ExportConfig) -> list[Exported]:
    left = _refuse_unfit(subject, config)
    rows = subject.rows(config)
    with _alone(subject), ExitStack() as folders:
        subject.begin(rows)
        log_to(subject.directory.log)
        reference = _reference(subject, rows.scored) if rows.scored else None
        bases = subject.merge_bases(config)
        _clear_other_merges(subject, bases)
        merges = [folders.enter_context(_sixteen_bit(subject, base)) for base in bases]
        jobs = [list(_jobs(config, _source(subject, folder, rows.calibration), left)) for folder, _ in merges]
        return [
            _write(subject, config, list(zip(same, merges, strict=True)), reference) for same in zip(*jobs, strict=True)
        ]


def refuse_unmeasurable(subject: Exportable, config: ExportConfig) -> None:
    """Refuse settings that judge by held-out rows, where there are none.

    Raises:
        RecipeError: there is a bound, or a merge base to be measured, and nothing to measure on.
    """
    if subject.holds_out:
        return
    problems = []
    if config.max_mean_kl is not None:
        what = f"export.max_mean_kl={config.max_mean_kl:g} is a bound on what is measured, and {subject.unmeasured}"
        problems.append(Problem(what, "export.max_mean_kl", EVAL_FILE))
    if config.merge_base is MergeBase.measure:
        what = f"export.merge_base=measure compares held-out losses, and {subject.unmeasured}"
        problems.append(Problem(what, "export.merge_base", EVAL_FILE))
    if problems:
        raise RecipeError(problems)


def _refuse_unfit(subject: Exportable, config: ExportConfig) -> Mapping[str, LeftOver]:
    """Refuse what the base cannot be written as, and say which layers will stay in 16 bit, by the file's name."""
    settings = subject.directory.adapter / CONFIG
    fit = fit_of(subject.base.folder, config, read_json(settings) if subject.trained and settings.is_file() else None)
    if fit.problems:
        raise RecipeError(fit.problems)
    for name, left in fit.left.items():
        log.info(f"{name}: {left}")
    return fit.left


def _jobs(config: ExportConfig, source: Source, left: Mapping[str, LeftOver]) -> Iterator[ExportJob]:
    for job in export_jobs(config, source):
        yield replace(job, left=left[job.name].record()) if job.name in left else job


@contextmanager
def _alone(subject: Exportable) -> Iterator[None]:
    """Hold the exports of a run or base, and clear away what a killed export left there."""
    directory = subject.directory
    directory.path.mkdir(parents=True, exist_ok=True)
    refuse_links_outside(directory.path)
    with hold(directory.path, "export"):
        directory.exports.mkdir(exist_ok=True)
        clear_left_overs(directory.exports)
        yield


def _reference(subject: Exportable, rows: Sequence[TokenRow]) -> Reference:
    log.info(f"scoring {subject.reference} on {counted(len(rows), 'held-out row')}")
    scorer, before = subject.open_reference()
    scores = scorer.score(rows, None, TOP_TOKENS)
    untrained = before.score(rows, None, 1) if before else None
    scorer.close()
    if before:
        before.close()
    return Reference(rows, Yardstick(scores, untrained))


def _source(subject: Exportable, sixteen_bit: Path, calibration: list[list[int]]) -> Source:
    return Source(sixteen_bit, subject.directory.adapter, subject.base.name, file_part(subject.name), calibration)


def _merge_folder(subject: Exportable, merge_base: MergeBase) -> Path:
    """Of a fixed name: after a kill, the next merge of the same inputs goes on in it."""
    return subject.directory.exports / f"{MERGED}{merge_base.name}"


def _clear_other_merges(subject: Exportable, bases: Sequence[MergeBase]) -> None:
    wanted = {_merge_folder(subject, base) for base in bases}
    for left in subject.directory.exports.glob(f"{MERGED}*"):
        if left not in wanted:
            remove(left)


@contextmanager
def _sixteen_bit(subject: Exportable, merge_base: MergeBase) -> Iterator[Merged]:
    folder = _merge_folder(subject, merge_base)
    folder.mkdir(exist_ok=True)
    try:
        yield folder, subject.write_sixteen_bit(merge_base, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    subject: Exportable,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
) -> Exported:
    """Write one file; from each merge, and the better one is kept."""
    name = candidates[0][0].name
    place = subject.directory.exports / name
    began = time.perf_counter()
    log.info(f"{name}: writing")
    try:
        with staged_directory(place) as folder:
            found = _best(subject, config, candidates, reference, folder)
    except Exception as error:
        kind = "" if isinstance(error, KitError) else f"{type(error).__name__}: "
        log.info(f"{name}: failed: {kind}{error}")
        return Exported(name, place, time.perf_counter() - began, error=f"{kind}{error}")
    kl = f", mean KL {found.fidelity.mean_kl:.4f}" if found.fidelity else ""
    log.info(f"{name}: {human_bytes(size_on_disk(place))} in {human_seconds(found.seconds)}{kl}, {found.verdict.shown}")
    return Exported(name, place, found.seconds, found.fidelity, found.verdict, found.faults)


def _best(
    subject: Exportable,
    config: ExportConfig,
    candidates: Sequence[tuple[ExportJob, Merged]],
    reference: Reference | None,
    folder: Path,
) -> Finished:
    candidates = _chosen(subject, config, candidates)
    job, merged = candidates[0]
    if len(candidates) == 1 or find_format(job.format).is_beside_base:
        return _made(subject, config, job, merged, reference, folder)
    found: dict[str, tuple[Path, Finished]] = {}
    with ExitStack() as folders:
        for job, merged in candidates:
            made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{job.name}.", suffix=".partial")
            made_folder = Path(folders.enter_context(made)) / "made"
            made_folder.mkdir()
            found[merged[1].base] = made_folder, _made(subject, config, job, merged, reference, made_folder)
        losses = {base: one.fidelity.loss for base, (_, one) in found.items() if one.fidelity is not None}
        best = min(losses, key=lambda base: (not math.isfinite(losses[base]), losses[base]))
        record_bases(found[best][0], losses)
        folder.rmdir()
        found[best][0].rename(folder)
    log.info(f"{job.name}: held-out loss by base: {', '.join(f'{base} {loss:.4f}' for base, loss in losses.items())}")
    return found[best][1]


def _chosen(
    subject: Exportable, config: ExportConfig, candidates: Sequence[tuple[ExportJob, Merged]]
) -> Sequence[tuple[ExportJob, Merged]]:
    """The merges that a file is made from: what auto names, else all."""
    if config.merge_base is not MergeBase.auto or len(candidates) == 1:
        return candidates
    job = candidates[0][0]
    wanted = subject.base_for(find_format(job.format).rounds_to(job.settings))
    return [one for one in candidates if one[1][1].base == wanted.name] or candidates[:1]


def _made(
    subject: Exportable,
    config: ExportConfig,
    job: ExportJob,
    merged: Merged,
    reference: Reference | None,
    folder: Path,
) -> Finished:
    began = time.perf_counter()
    spent = job.write(folder)
    seconds = time.perf_counter() - began
    bits = spent.record() if spent else {}
    return finish(subject, job, folder, *merged, reference, config.max_mean_kl, seconds, bits)
