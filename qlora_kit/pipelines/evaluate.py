"""Evaluate: base, adapter, merged and every export on the same held-out rows, in one table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import size_on_disk, write_json
from qlora_kit.core.say import say
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.encode import Encoder
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.artifacts import open_artifact, open_trained
from qlora_kit.evaluation.scores import Answers, Fidelity, Scorer, Scores, compare
from qlora_kit.evaluation.tasks import judge
from qlora_kit.export.manifest import MANIFEST, read_manifest, record_scores
from qlora_kit.pipelines.opened_run import OpenedRun
from qlora_kit.schema.data import Task
from qlora_kit.schema.eval import EvalConfig

TRAINED = ("base", "adapter")


@dataclass(frozen=True)
class Row:
    """One artifact's scores."""

    name: str
    size_bytes: int
    fidelity: Fidelity
    exact_match: float | None
    answered: int
    tokens_per_second: float
    rejected: bool = False


@dataclass(frozen=True)
class _Exam:
    """What every artifact is asked."""

    prompts: list[list[int]]
    expected: list[str]
    task: Task
    config: EvalConfig


def evaluate(opened: OpenedRun, config: EvalConfig) -> list[Row]:
    """Score the artifacts that the recipe names and write eval.json and each manifest."""
    exports = exported_folders(opened.directory.exports)
    wanted = _wanted(config.artifacts, list(exports))
    data = opened.held_out()
    rows = data.scored(config.kl_rows)
    exam = _exam(opened, data.held_out_conversations(config.task_rows), config)

    recipe, pad = opened.recipe, int(opened.tokenizer.pad_token_id)
    adapter, base = open_trained(opened.base_folder, opened.directory.adapter, recipe.quant, pad)
    reference = adapter.score(rows, None, config.top_tokens)
    table = []
    sizes = {"base": size_on_disk(opened.base_folder), "adapter": size_on_disk(opened.directory.adapter)}
    for name, scorer in (("base", base), ("adapter", adapter)):
        if name in wanted:
            fidelity = compare(reference, scorer.score(rows, reference.ids, config.top_tokens))
            table.append(_row(opened, name, sizes[name], scorer, fidelity, exam))
    adapter.close()
    base.close()

    for name in wanted:
        if name in exports:
            table.append(_score_export(opened, exports[name], rows, reference, exam))
    write_json(opened.directory.evaluation, {"rows": [asdict(row) for row in table]})
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


def _exam(opened: OpenedRun, conversations: Sequence[Conversation], config: EvalConfig) -> _Exam:
    encoder = Encoder.of(opened.tokenizer)
    prompts = [encoder.prompt_ids(conversation) for conversation in conversations]
    expected = [conversation.messages[-1].content for conversation in conversations]
    return _Exam(prompts, expected, opened.recipe.data.task, config)


def _score_export(opened: OpenedRun, folder: Path, rows: Sequence[TokenRow], reference: Scores, exam: _Exam) -> Row:
    manifest = read_manifest(folder)
    scorer = open_artifact(manifest["format"], folder / manifest["file"], opened.tokenizer)
    try:
        fidelity = compare(reference, scorer.score(rows, reference.ids, exam.config.top_tokens))
        row = _row(opened, folder.name, size_on_disk(folder), scorer, fidelity, exam, bool(manifest["rejected"]))
    finally:
        scorer.close()
    record_scores(folder, asdict(row))
    return row


def _row(
    opened: OpenedRun, name: str, size: int, scorer: Scorer, fidelity: Fidelity, exam: _Exam, rejected: bool = False
) -> Row:
    answers = Answers([], 0.0)
    match = None
    if exam.task is not Task.none:
        config = exam.config
        answers = scorer.answer(exam.prompts, config.max_new_tokens, config.batch_size)
        match = sum(_right(opened, answers, exam)) / len(exam.expected)
    say(
        f"{name}: loss {fidelity.loss:.4f}, mean KL {fidelity.mean_kl:.4f}"
        + ("" if match is None else f", exact {match:.1%}")
    )
    return Row(name, size, fidelity, match, len(answers.token_ids), answers.tokens_per_second, rejected)


def _right(opened: OpenedRun, answers: Answers, exam: _Exam) -> Iterator[bool]:
    for token_ids, expected in zip(answers.token_ids, exam.expected, strict=True):
        answer = opened.tokenizer.decode(token_ids, skip_special_tokens=True)
        yield judge(exam.task, answer, expected)
