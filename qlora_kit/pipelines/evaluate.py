"""Evaluate: every export, and the models that it came of, on the same held-out rows, in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.console.session import log_to
from qlora_kit.core.errors import FidelityError, KitError, Problem, RecipeError, RunError
from qlora_kit.core.files import size_on_disk
from qlora_kit.core.lock import hold
from qlora_kit.core.shell import hydra_value, shell_line
from qlora_kit.core.units import counted
from qlora_kit.core.verdict import Verdict, recorded_verdict, verdict_on
from qlora_kit.evaluation.eval_plan import EvalPlan, build_eval_plan
from qlora_kit.evaluation.harness import TaskScores, require_harness, run_harness
from qlora_kit.evaluation.intervals import CONFIDENCE, Interval, wilson
from qlora_kit.evaluation.judge import Baselines, faults_of
from qlora_kit.evaluation.perplexity import text_fit
from qlora_kit.evaluation.record import asked, write_record
from qlora_kit.evaluation.reference import open_models
from qlora_kit.evaluation.scored_on import scored_on
from qlora_kit.evaluation.scores import Answers, Fidelity, Scorer, Scores, compare
from qlora_kit.evaluation.tasks import grade
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.export.manifest import faults_of_export, read_manifest, record_scores
from qlora_kit.export.rows import rows_of_eval
from qlora_kit.formats.exported import rejection
from qlora_kit.formats.finish import rewrite_card
from qlora_kit.formats.registry import find_format
from qlora_kit.runs.directory import MANIFEST
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import Task
from qlora_kit.schema.eval import EvalConfig

SAMPLES = 3


@dataclass(frozen=True)
class Row:
    """One artifact's scores; None where something was not asked for. Intervals are 95%, with the row as the unit.

    Attributes:
        exact_match: share of answers that the task calls right.
        verdict: on a file, by its manifest and these scores; empty for the models beside the files.
        faults: that these scores show.
        stops: share of answers that ended with the model's own stop token before the limit.
        text_perplexity: of `eval.text_file`, its interval by window.
        lm_eval: the harness's numbers by task and metric.
    """

    name: str
    size_bytes: int
    fidelity: Fidelity
    exact_match: float | None
    answered: int
    tokens_per_second: float
    verdict: str = ""
    rejected: bool = False
    faults: tuple[str, ...] = ()
    exact_match_interval: Interval | None = None
    stops: float | None = None
    stops_interval: Interval | None = None
    text_perplexity: float | None = None
    text_perplexity_interval: Interval | None = None
    text_tokens: int = 0
    lm_eval: TaskScores = field(default_factory=dict)


@dataclass(frozen=True)
class Unscored:
    """A file that its reader could not score, and why."""

    name: str
    size_bytes: int
    error: str


@dataclass(frozen=True)
class _Asked:
    """An artifact that is asked."""

    name: str
    size_bytes: int
    manifest: Mapping[str, Any] | None = None


def evaluate(run: Run, config: EvalConfig) -> list[Row | Unscored]:
    """Score the artifacts that the recipe names and write eval.json and each manifest; a file that fails is a row.

    Raises:
        RecipeError: an artifact, the text file or a task of the harness is not there.
    """
    with hold(run.directory.path, "eval"):
        log_to(run.directory.log)
        return _evaluate(run, config)


def _evaluate(run: Run, config: EvalConfig) -> list[Row | Unscored]:
    exports = exported_folders(run.directory.exports)
    wanted = _wanted(config.artifacts, run, list(exports))
    if config.lm_eval:
        require_harness()
    rows = rows_of_eval(run, config, config.eos_rows if run.task is Task.none else config.task_rows)
    plan = build_eval_plan(run, rows.scored, rows.conversations, config)

    models = open_models(run)
    baselines = _baselines(models, plan)
    table: list[Row | Unscored] = []
    for name, scorer in models.items():
        if name in wanted:
            one = _Asked(name, size_on_disk(run.directory.adapter if name == "adapter" else run.base.folder))
            table.append(_row(run, one, scorer, baselines, plan))
    for scorer in models.values():
        scorer.close()

    table.extend(_score_or_say(run, exports[name], baselines, plan) for name in wanted if name in exports)
    write_record(run.directory.evaluation, _record(table, plan), _current(run, exports, table))
    return table


def _current(run: Run, exports: Mapping[str, Path], table: Sequence[Row | Unscored]) -> list[str]:
    """Artifacts whose scores in eval.json are still theirs: a file that was written again has none in its manifest."""
    now = {row.name for row in table}
    held = (name for name, folder in exports.items() if name in now or read_manifest(folder).get("evaluation"))
    return [*run.models, *held]


def exported_folders(exports: Path) -> dict[str, Path]:
    """Complete artifacts of a run, by name; the 16-bit merge first."""
    formats: dict[Path, str] = {}
    for folder in sorted(exports.glob("[!.]*/")):
        if not (folder / MANIFEST).is_file():
            log.warning(f"{folder.name} is left out: it holds no {MANIFEST}, which says what it is; export it again")
    for path in exports.glob(f"*/{MANIFEST}"):
        if path.parent.name.startswith("."):
            continue
        try:
            formats[path.parent] = read_manifest(path.parent)["format"]
        except RecipeError as error:
            log.warning(f"{path.parent.name} is left out: {error.problems[0].what}")
    ordered = sorted(formats, key=lambda folder: (formats[folder] != "merged", folder.name))
    return {folder.name: folder for folder in ordered}


def _wanted(artifacts: Sequence[str], run: Run, exports: list[str]) -> list[str]:
    known = [*run.models, *exports]
    if list(artifacts) == ["all"]:
        return known
    unknown = [name for name in artifacts if name not in known]
    if unknown:
        raise RecipeError(
            f"{run.directory.path} has no artifact named {', '.join(unknown)}; it has {', '.join(known)}",
            "eval.artifacts",
            shell_line([f"eval.artifacts={hydra_value(known)}"]),
        )
    return [name for name in known if name in artifacts]


def _baselines(models: Mapping[str, Scorer], plan: EvalPlan) -> Baselines:
    log.info(f"eval: scoring {plan.reference}, which the others are held against, on {counted(len(plan.rows), 'row')}")
    reference = models[plan.reference].score(plan.rows, None, plan.config.top_tokens)
    before = next((scorer for name, scorer in models.items() if name != plan.reference), None)
    return Baselines(reference, before.score(plan.rows, None, 1) if before else None)


def _score_or_say(run: Run, folder: Path, baselines: Baselines, plan: EvalPlan) -> Row | Unscored:
    """Score a file; one that fails keeps its place, and the others go on."""
    try:
        return _score_export(run, folder, baselines, plan)
    except Exception as error:
        plan.said.pop(folder.name, None)
        kind = "" if isinstance(error, KitError) else f"{type(error).__name__}: "
        log.info(f"{folder.name}: failed: {kind}{error}")
        return Unscored(folder.name, size_on_disk(folder), f"{kind}{error}")


def _score_export(run: Run, folder: Path, baselines: Baselines, plan: EvalPlan) -> Row:
    manifest = read_manifest(folder)
    one = _Asked(folder.name, size_on_disk(folder), manifest)
    pad = int(run.tokenizer.pad_token_id)
    scorer = find_format(manifest["format"]).open(folder / manifest["file"], pad, run.base.folder)
    try:
        row = _row(run, one, scorer, baselines, plan)
    finally:
        scorer.close()
    record_scores(folder, asdict(row), scored_on(plan.rows))
    if row.verdict != recorded_verdict(manifest).value and not folder.is_symlink():
        rewrite_card(run, read_manifest(folder), folder)
    return row


def _row(run: Run, one: _Asked, scorer: Scorer, baselines: Baselines, plan: EvalPlan) -> Row:
    config, reference = plan.config, baselines.reference
    log.info(f"eval: {one.name} ...")
    scores = scorer.score(plan.rows, reference.ids, config.top_tokens)
    fidelity = compare(reference, scores)
    answers = Answers([], 0.0)
    if plan.prompts:
        answers = scorer.answer(plan.prompts, config.max_new_tokens, config.batch_size)
    said = [run.tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in answers.token_ids]
    plan.said[one.name] = said[:SAMPLES]
    right = (
        [] if plan.task is Task.none else [grade(plan.task, *pair) for pair in zip(said, plan.expected, strict=True)]
    )
    text = text_fit(scorer, plan.windows) if plan.windows else None
    verdict, faults = _judged(one.manifest, fidelity, scores, baselines)
    row = Row(
        name=one.name,
        size_bytes=one.size_bytes,
        fidelity=fidelity,
        exact_match=_share(right),
        answered=len(answers.token_ids),
        tokens_per_second=answers.tokens_per_second,
        verdict=verdict.value if verdict else "",
        rejected=verdict is Verdict.rejected,
        faults=faults,
        exact_match_interval=wilson(sum(right), len(right)),
        stops=_share(answers.stopped),
        stops_interval=wilson(sum(answers.stopped), len(answers.stopped)),
        text_perplexity=text.perplexity if text else None,
        text_perplexity_interval=text.interval if text else None,
        text_tokens=text.tokens if text else 0,
        lm_eval=_harness(run, one.name, scorer, plan),
    )
    log.info(_told(row, plan.reference))
    return row


def _judged(
    manifest: Mapping[str, Any] | None, fidelity: Fidelity, scores: Scores, baselines: Baselines
) -> tuple[Verdict | None, tuple[str, ...]]:
    """The verdict on a file, and what these scores show; a file that was rejected stays so until it is made again."""
    if manifest is None:
        return None, tuple(faults_of(fidelity, None))
    bound = manifest.get("max_mean_kl")
    faults = tuple(faults_of(fidelity, bound, scores, baselines))
    was_rejected = recorded_verdict(manifest) is Verdict.rejected
    if was_rejected and (faults_of_export(manifest) or not manifest.get("faults")):
        return Verdict.rejected, faults
    return verdict_on(is_measured=True, max_mean_kl=bound, faults=faults), faults


def raise_failed_scores(table: Sequence[Row | Unscored], exports: Path) -> None:
    """End as the worst of the scores did.

    Args:
        exports: the folder of the files' folders.

    Raises:
        RunError: a file could not be scored; the others are.
        FidelityError: a file is rejected, by these scores or before, or scores of a model are not finite.
    """
    fix = "export it again, or move its folder out of exports/"
    if failed := [row for row in table if isinstance(row, Unscored)]:
        raise RunError(
            [Problem(f"{one.name} was not scored: {one.error}", str(exports / one.name), fix) for one in failed]
        )
    scored = [row for row in table if isinstance(row, Row) and (row.rejected or row.faults)]
    faults = {exports / row.name: row.faults or ("see its manifest.json",) for row in scored}
    if faults:
        raise FidelityError(rejection(faults))


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _harness(run: Run, name: str, scorer: Scorer, plan: EvalPlan) -> TaskScores:
    if not plan.harness.names:
        return {}
    if not isinstance(scorer, TorchScorer):
        log.warning(f"{name}: lm-eval runs models of transformers only, so its tasks are left out here")
        return {}
    with scorer.lent() as model:
        return run_harness(model, run.tokenizer, plan.harness, plan.config.batch_size, plan.config.lm_eval_limit)


def _told(row: Row, reference: str) -> str:
    parts = [f"loss {row.fidelity.loss:.4f}", f"mean KL {row.fidelity.mean_kl:.4f}"]
    if row.exact_match is not None:
        parts.append(f"exact {row.exact_match:.1%}")
    if row.stops is not None:
        parts.append(f"stops {row.stops:.0%}")
    if row.text_perplexity is not None:
        parts.append(f"text perplexity {row.text_perplexity:.3f}")
    # Noise aside: an artifact whose loss is above the reference's on these very rows.
    is_worse = row.name not in ("base", reference) and row.fidelity.is_worse
    worse = f" (loss {row.fidelity.loss_change:+.4f} against the {reference}'s)" if is_worse else ""
    return f"{row.name}: {', '.join(parts)}{worse}"


def _record(table: Sequence[Row | Unscored], plan: EvalPlan) -> Mapping[str, object]:
    samples = [
        {"prompt": question, "expected": expected, "answers": {name: said[place] for name, said in plan.said.items()}}
        for place, (question, expected) in enumerate(zip(plan.questions, plan.expected, strict=True))
        if place < SAMPLES
    ]
    return {
        "rows": [asdict(row) for row in table],
        "samples": samples,
        "confidence": CONFIDENCE,
        "text_file": plan.config.text_file,
        "asked": asked(plan),
    }
