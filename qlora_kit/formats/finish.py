"""What is done with a file once it is written: it is scored, made ready to serve, checked, and recorded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.verdict import Verdict, recorded_verdict, verdict_on
from qlora_kit.evaluation.judge import faults_of
from qlora_kit.evaluation.reference import Reference
from qlora_kit.evaluation.scored_on import scored_on
from qlora_kit.evaluation.scores import Fidelity, Scores, compare
from qlora_kit.evaluation.servers.run import ServerCheck
from qlora_kit.export.manifest import Manifest
from qlora_kit.export.merge import MergeReport
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.export.serving.generation_config import served_stop_ids
from qlora_kit.export.serving.model_card import served_of, write_model_card
from qlora_kit.export.serving.write import write_serving_files
from qlora_kit.formats.far_from_rounding import far_from_rounding
from qlora_kit.formats.format import UNPACKED
from qlora_kit.formats.job import ExportJob, Written
from qlora_kit.formats.registry import find_format
from qlora_kit.formats.retention import measured_retention, record
from qlora_kit.formats.servers import check_servers
from qlora_kit.formats.token_parity import check_token_ids
from qlora_kit.runs.run import Run

TOP_TOKENS = 256


@dataclass(frozen=True)
class Finished:
    """What was found of a file.

    Attributes:
        fidelity: None without held-out rows.
        faults: why the file must not be served; none for a good one.
        seconds: that writing it took.
    """

    verdict: Verdict
    fidelity: Fidelity | None
    faults: tuple[str, ...]
    seconds: float


def finish(
    run: Run,
    job: ExportJob,
    folder: Path,
    made_from: tuple[Path, MergeReport],
    reference: Reference | None,
    max_mean_kl: float | None,
    seconds: float,
    written: Written,
) -> Finished:
    """Score a written artifact, add its serving files, check what its readers make of it, and write its manifest.

    Args:
        folder: of the artifact.
        made_from: the 16-bit folder, and what was merged into it.
        written: how it was made, for the record.
    """
    merged, merge = made_from
    scores = _scores(run, job, folder, reference) if reference else None
    fidelity = compare(reference.scores, scores) if reference and scores else None
    uncalibrated = written.uncalibrated.record() if written.uncalibrated else {}
    reader = find_format(job.format).read_by(folder)
    facts = _facts(run, job, reader, fidelity, uncalibrated)
    write_serving_files(folder, facts)
    stops = served_stop_ids(run.base.folder, run.tokenizer)
    contract = check_token_ids(job.format, folder, job.file, run.tokenizer, stops)
    servers = check_servers(job.format, folder, job.file)
    far: list[str] = []
    if fidelity and reference:
        far = list(faults_of(fidelity, max_mean_kl, scores, reference.baselines))
        if not far:
            far = list(far_from_rounding(job, fidelity, merged, reference, int(run.tokenizer.pad_token_id)))
    faults = (*far, *map(str, contract.failures), *_wrong_for(servers))
    verdict = verdict_on(is_measured=fidelity is not None, max_mean_kl=max_mean_kl, faults=faults)
    write_model_card(folder, replace(facts, faults=faults, verdict=verdict))
    for note in contract.notes:
        log.info(f"{job.name}: {note}")
    commands = facts.format.serve_commands(served_of(facts, str(run.directory.exports / job.name)))
    Manifest(
        name=job.name,
        format=job.format,
        file=job.file,
        settings=job.settings,
        bits=written.allocation.record() if written.allocation else {},
        uncalibrated=uncalibrated,
        left_in_16_bit=job.unquantized,
        merge=merge,
        run=str(run.directory.path),
        seconds=round(seconds, 1),
        fidelity=asdict(fidelity) if fidelity else {},
        max_mean_kl=max_mean_kl,
        verdict=verdict.value,
        rejected=verdict is Verdict.rejected,
        faults=faults,
        reader=reader,
        contract={"compared": contract.compared, "holds": contract.holds, "notes": list(contract.notes)},
        servers=[asdict(check) for check in servers],
        survival=record(measured_retention(job, folder, merged, merge, run.trained.adapter)) if run.trained else {},
        serve=[asdict(command) for command in commands],
        scored_on=scored_on(reference.rows) if reference else {},
    ).write(folder)
    return Finished(verdict, fidelity, faults, seconds)


def rewrite_card(run: Run, manifest: Mapping[str, Any], folder: Path) -> None:
    """Write a file's card anew, once `eval` came to another verdict than its export."""
    settings = dict(manifest.get("settings") or {})
    left = manifest.get("left_in_16_bit") or {}
    job = ExportJob(folder.name, manifest["format"], manifest["file"], settings, _written, left)
    fidelity = Fidelity.from_record(manifest["evaluation"]["fidelity"])
    facts = replace(
        _facts(run, job, find_format(job.format).read_by(folder), fidelity, manifest.get("uncalibrated") or {}),
        faults=manifest["faults"],
        verdict=recorded_verdict(manifest),
    )
    write_model_card(folder, facts)


def _written(folder: Path) -> None:
    raise AssertionError(f"{folder} is written already")


def _scores(run: Run, job: ExportJob, folder: Path, reference: Reference) -> Scores:
    pad = int(run.tokenizer.pad_token_id)
    scorer = find_format(job.format).open(folder / job.file, pad, run.base.folder)
    try:
        return scorer.score(reference.rows, reference.scores.ids, TOP_TOKENS)
    finally:
        scorer.close()


def _wrong_for(servers: Sequence[ServerCheck]) -> Iterator[str]:
    for check in servers:
        yield from (f"{check.server}: {problem}" for problem in check.problems)


def _facts(
    run: Run, job: ExportJob, reader: str, fidelity: Fidelity | None, uncalibrated: Mapping[str, object]
) -> ServingFacts:
    return ServingFacts(
        name=job.name,
        format=find_format(job.format),
        file=job.file,
        settings=job.settings,
        base=run.base,
        tokenizer=run.tokenizer,
        run=run.trained,
        directory=run.directory,
        seed=run.seed,
        fidelity=asdict(fidelity) if fidelity else {},
        unquantized=job.unquantized,
        uncalibrated=uncalibrated,
        is_unpacked=reader == UNPACKED,
    )
