"""Evaluate: base, adapter, merged and every export on the same held-out rows, in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, size_on_disk, write_json
from qlora_kit.core.say import say
from qlora_kit.data.encode import Encoder
from qlora_kit.data.prepare import PreparedData
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.artifacts import open_artifact, open_trained
from qlora_kit.evaluation.harness import HarnessTasks, TaskScores, harness_tasks, require_harness, run_harness
from qlora_kit.evaluation.intervals import CONFIDENCE, Interval, wilson
from qlora_kit.evaluation.perplexity import text_fit, text_windows
from qlora_kit.evaluation.scores import Answers, Fidelity, Scorer, Scores, compare
from qlora_kit.evaluation.tasks import judge
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.export.manifest import MANIFEST, read_manifest, record_scores
from qlora_kit.pipelines.finish_export import adapter_base
from qlora_kit.pipelines.opened_run import OpenedRun
from qlora_kit.schema.data import Task
from qlora_kit.schema.eval import EvalConfig

TRAINED = ("base", "adapter")
SAMPLES = 3


@dataclass(frozen=True)
class Row:
    """One artifact's scores; None where something was not asked for. Intervals are 95%, with the row as the unit.

    Attributes:
        exact_match: share of answers that the task calls right.
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
    rejected: bool = False
    exact_match_interval: Interval | None = None
    stops: float | None = None
    stops_interval: Interval | None = None
    text_perplexity: float | None = None
    text_perplexity_interval: Interval | None = None
    text_tokens: int = 0
    lm_eval: TaskScores = field(default_factory=dict)


@dataclass(frozen=True)
class _Exam:
    """What every artifact is asked, and the first answers in words by artifact, as they come."""

    rows: Sequence[TokenRow]
    prompts: list[list[int]]
    questions: list[str]
    expected: list[str]
    task: Task
    windows: Sequence[TokenRow]
    harness: HarnessTasks
    config: EvalConfig
    said: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Subject:
    """An artifact that is asked."""

    name: str
    size_bytes: int
    rejected: bool = False


def evaluate(opened: OpenedRun, config: EvalConfig) -> list[Row]:
    """Score the artifacts that the recipe names and write eval.json and each manifest.

    Raises:
        RecipeError: an artifact, the text file or a task of the harness is not there.
    """
    exports = exported_folders(opened.directory.exports)
    wanted = _wanted(config.artifacts, list(exports))
    exam = _exam(opened, opened.held_out(), config)

    recipe, pad = opened.recipe, int(opened.tokenizer.pad_token_id)
    adapter, base = open_trained(opened.base_folder, opened.directory.adapter, recipe.quant, pad)
    reference = adapter.score(exam.rows, None, config.top_tokens)
    table = []
    folders = {"base": opened.base_folder, "adapter": opened.directory.adapter}
    for name, scorer in (("base", base), ("adapter", adapter)):
        if name in wanted:
            table.append(_row(opened, _Subject(name, size_on_disk(folders[name])), scorer, reference, exam))
    adapter.close()
    base.close()

    for name in wanted:
        if name in exports:
            table.append(_score_export(opened, exports[name], reference, exam))
    write_json(opened.directory.evaluation, _record(table, exam))
    return table


def exported_folders(exports: Path) -> dict[str, Path]:
    """Complete artifacts of a run, by name; the 16-bit merge first."""
    folders = [path.parent for path in exports.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
    ordered = sorted(folders, key=lambda folder: (read_manifest(folder)["format"] != "merged", folder.name))
    return {folder.name: folder for folder in ordered}


def _wanted(artifacts: Sequence[str], exports: list[str]) -> list[str]:
    known = [*TRAINED, *exports]
    if list(artifacts) == ["all"]:
        return known
    unknown = [name for name in artifacts if name not in known]
    if unknown:
        raise RecipeError(
            f"this run has no artifact named {', '.join(unknown)}; it has {', '.join(known)}",
            "eval.artifacts",
            f"eval.artifacts=[{','.join(known)}]",
        )
    return [name for name in known if name in artifacts]


def _exam(opened: OpenedRun, data: PreparedData, config: EvalConfig) -> _Exam:
    """Everything that can be wrong with the recipe comes up here, before a weight is loaded."""
    encoder, task = Encoder.of(opened.tokenizer), opened.recipe.data.task
    if config.lm_eval:
        require_harness()
    windows: list[TokenRow] = []
    if config.text_file is not None:
        _refuse_long_window(opened.base_folder, config.text_window)
        place, size, stride = Path(config.text_file), config.text_window, config.text_stride
        windows = text_windows(place, opened.tokenizer, encoder.bos, size, stride, config.text_windows)
    asked = config.stop_prompts if task is Task.none else config.task_rows
    conversations = [] if asked == 0 else data.held_out_conversations(asked)
    prompts = [(ids, row) for row in conversations if (ids := encoder.prompt_ids(row))]
    if len(prompts) < len(conversations):
        say(f"{len(conversations) - len(prompts)} held-out rows are texts without a prompt, so nothing answers them")
    return _Exam(
        rows=data.scored(config.kl_rows),
        prompts=[ids for ids, _ in prompts],
        questions=["\n".join(message.content for message in row.messages[-2:-1]) for _, row in prompts],
        expected=[row.messages[-1].content for _, row in prompts],
        task=task,
        windows=windows,
        harness=harness_tasks(config.lm_eval),
        config=config,
    )


def _refuse_long_window(base_folder: Path, window: int) -> None:
    """A model that reads more than it was made for answers nonsense, and says nothing about it."""
    path = base_folder / "config.json"
    longest = read_json(path).get("max_position_embeddings") if path.is_file() else None
    if isinstance(longest, int) and window > longest:
        what = f"eval.text_window={window} is more than the {longest} positions that this base was made for"
        raise RecipeError(what, "eval.text_window", f"eval.text_window={longest}")


def _score_export(opened: OpenedRun, folder: Path, reference: Scores, exam: _Exam) -> Row:
    manifest = read_manifest(folder)
    subject = _Subject(folder.name, size_on_disk(folder), bool(manifest["rejected"]))
    beside = adapter_base(opened.base_folder)
    scorer = open_artifact(manifest["format"], folder / manifest["file"], opened.tokenizer, beside)
    try:
        row = _row(opened, subject, scorer, reference, exam)
    finally:
        scorer.close()
    record_scores(folder, asdict(row))
    return row


def _row(opened: OpenedRun, subject: _Subject, scorer: Scorer, reference: Scores, exam: _Exam) -> Row:
    config = exam.config
    fidelity = compare(reference, scorer.score(exam.rows, reference.ids, config.top_tokens))
    answers = Answers([], 0.0)
    if exam.prompts:
        answers = scorer.answer(exam.prompts, config.max_new_tokens, config.batch_size)
    said = [opened.tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in answers.token_ids]
    exam.said[subject.name] = said[:SAMPLES]
    right = (
        [] if exam.task is Task.none else [judge(exam.task, *pair) for pair in zip(said, exam.expected, strict=True)]
    )
    text = text_fit(scorer, exam.windows) if exam.windows else None
    row = Row(
        name=subject.name,
        size_bytes=subject.size_bytes,
        fidelity=fidelity,
        exact_match=_share(right),
        answered=len(answers.token_ids),
        tokens_per_second=answers.tokens_per_second,
        rejected=subject.rejected,
        exact_match_interval=wilson(sum(right), len(right)),
        stops=_share(answers.stopped),
        stops_interval=wilson(sum(answers.stopped), len(answers.stopped)),
        text_perplexity=text.perplexity if text else None,
        text_perplexity_interval=text.interval if text else None,
        text_tokens=text.tokens if text else 0,
        lm_eval=_harness(opened, subject.name, scorer, exam),
    )
    say(_told(row))
    return row


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _harness(opened: OpenedRun, name: str, scorer: Scorer, exam: _Exam) -> TaskScores:
    if not exam.harness.names:
        return {}
    if not isinstance(scorer, TorchScorer):
        say(f"{name}: lm-eval runs models of transformers only, so its tasks are left out here")
        return {}
    with scorer.lent() as model:
        return run_harness(model, opened.tokenizer, exam.harness, exam.config.batch_size, exam.config.lm_eval_limit)


def _told(row: Row) -> str:
    parts = [f"loss {row.fidelity.loss:.4f}", f"mean KL {row.fidelity.mean_kl:.4f}"]
    if row.exact_match is not None:
        parts.append(f"exact {row.exact_match:.1%}")
    if row.stops is not None:
        parts.append(f"stops {row.stops:.0%}")
    if row.text_perplexity is not None:
        parts.append(f"text perplexity {row.text_perplexity:.3f}")
    # Noise aside: an artifact whose loss is above the adapter's on these very rows.
    worse = " (loss is worse than the adapter's)" if row.name not in TRAINED and row.fidelity.is_worse else ""
    return f"{row.name}: {', '.join(parts)}{worse}"


def _record(table: Sequence[Row], exam: _Exam) -> Mapping[str, object]:
    samples = [
        {"prompt": question, "expected": expected, "answers": {name: said[place] for name, said in exam.said.items()}}
        for place, (question, expected) in enumerate(zip(exam.questions, exam.expected, strict=True))
        if place < SAMPLES
    ]
    return {
        "rows": [asdict(row) for row in table],
        "samples": samples,
        "confidence": CONFIDENCE,
        "text_file": exam.config.text_file,
    }
