"""Recipe group `data` -> token rows ready to train and to score, with the numbers that data.json records."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import file_hash
from qlora_kit.core.say import say
from qlora_kit.data.render import TokenRow, answer_text, token_row
from qlora_kit.data.rows import Conversation, RowFile, read_rows, shown_problems
from qlora_kit.schema.data import DataConfig, LongRows, RowFormat, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_LINES_NAMED = 20


@dataclass(frozen=True)
class FileSummary:
    """One file of rows in numbers; tokens are counted after dropping, without padding."""

    file: str
    sha256: str
    format: str
    rows: int
    dropped_rows: int
    tokens: int
    trained_tokens: int
    trained_share: float
    longest_row: int


@dataclass(frozen=True)
class DataSummary:
    """Both files of a run; JSON through `dataclasses.asdict`."""

    train: FileSummary
    held_out: FileSummary | None


@dataclass(frozen=True)
class PreparedData:
    """Token rows and the conversations they came from, in the same order."""

    train: list[TokenRow]
    held_out: list[TokenRow]
    held_out_conversations: list[Conversation]
    train_conversations: list[Conversation]
    summary: DataSummary


@dataclass(frozen=True)
class _Split:
    conversations: list[Conversation]
    rows: list[TokenRow]
    summary: FileSummary


def prepare(config: DataConfig, tokenizer: "PreTrainedTokenizerFast") -> PreparedData:
    """Read, check, render and tokenize the training and the held-out rows.

    Raises:
        RecipeError: a file or row cannot be used, a row is longer than `max_tokens` with `on_long_row=error`, or a
            held-out row is also trained on. Problems of both files are reported together.
    """
    train_file, held_out_file = _read_both(config)
    if held_out_file is not None:
        _refuse_overlap(train_file.conversations, held_out_file.conversations)
        _check_task(config.task, held_out_file.conversations)
    train = _split(train_file, Path(config.train_file), config, tokenizer)
    if held_out_file is None or config.eval_file is None:
        return PreparedData(train.rows, [], [], train.conversations, DataSummary(train.summary, None))
    held_out = _split(held_out_file, Path(config.eval_file), config, tokenizer)
    summary = DataSummary(train.summary, held_out.summary)
    return PreparedData(train.rows, held_out.rows, held_out.conversations, train.conversations, summary)


def _read_both(config: DataConfig) -> tuple[RowFile, RowFile | None]:
    wanted = [(config.train_file, config.train_rows)]
    if config.eval_file is not None:
        wanted.append((config.eval_file, config.eval_rows))
    files: list[RowFile] = []
    problems: list[Problem] = []
    for name, limit in wanted:
        try:
            files.append(read_rows(Path(name), config.format, config.apply_chat_template, limit))
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    if config.format is RowFormat.auto:
        for (name, _), file in zip(wanted, files, strict=True):
            say(f"{name}: {len(file.conversations)} rows, recognised as {file.format.name}")
    return files[0], files[1] if len(files) > 1 else None


def _split(file: RowFile, path: Path, config: DataConfig, tokenizer: "PreTrainedTokenizerFast") -> _Split:
    rows = _token_rows(file.conversations, tokenizer)
    is_short = [len(row.input_ids) <= config.max_tokens for row in rows]
    long = [row for row, short in zip(rows, is_short, strict=True) if not short]
    if long:
        _report_long(long, path, config, len(rows))
    kept = [row for row, short in zip(rows, is_short, strict=True) if short]
    conversations = [row for row, short in zip(file.conversations, is_short, strict=True) if short]
    return _Split(conversations, kept, _summary(kept, path, file.format, len(long)))


def _token_rows(conversations: list[Conversation], tokenizer: "PreTrainedTokenizerFast") -> list[TokenRow]:
    rows: list[TokenRow] = []
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            row = token_row(conversation, tokenizer)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        if not any(row.trained):
            problems.append(Problem("no token of this row would be trained", f"{row.file}:{row.line}"))
        rows.append(row)
    if problems:
        raise RecipeError(shown_problems(list(dict.fromkeys(problems))))
    return rows


def _report_long(long: list[TokenRow], path: Path, config: DataConfig, of: int) -> None:
    longest = max(len(row.input_ids) for row in long)
    if config.on_long_row is LongRows.error:
        raise RecipeError(
            f"{len(long)} of {of} rows are longer than data.max_tokens={config.max_tokens}; "
            f"the longest has {longest} tokens",
            where=f"{path}, {_named_lines(row.line for row in long)}",
            fix=f"data.max_tokens={longest} or data.on_long_row=drop",
        )
    if len(long) == of:
        raise RecipeError(
            f"every row is longer than data.max_tokens={config.max_tokens}, so none is left",
            where=str(path),
            fix=f"data.max_tokens={longest}",
        )
    say(f"{path}: dropped {len(long)} of {of} rows longer than data.max_tokens={config.max_tokens} (longest {longest})")


def _refuse_overlap(train: list[Conversation], held_out: list[Conversation]) -> None:
    trained_lines: dict[str, int] = {}
    for row in train:
        trained_lines.setdefault(_content_hash(row), row.line)
    shared = [(row.line, trained_lines[key]) for row in held_out if (key := _content_hash(row)) in trained_lines]
    if not shared:
        return
    pairs = ", ".join(f"{mine} (training line {theirs})" for mine, theirs in shared[:MOST_LINES_NAMED])
    more = f" and {len(shared) - MOST_LINES_NAMED} more" if len(shared) > MOST_LINES_NAMED else ""
    raise RecipeError(
        f"{len(shared)} held-out rows are also training rows, so their score would say nothing: lines {pairs}{more}",
        where=f"{held_out[0].file} and {train[0].file}",
        fix=f"take those lines out of {train[0].file}, or data.eval_file=<other rows>",
    )


def _check_task(task: Task, held_out: list[Conversation]) -> None:
    """Refuse held-out answers that the task cannot judge, before anything is trained."""
    problems = []
    for row in held_out if task is Task.json_exact_match else []:
        try:
            json.loads(answer_text(row))
        except (json.JSONDecodeError, RecursionError):
            what = "data.task=json_exact_match, but this held-out answer is not JSON"
            problems.append(Problem(what, f"{row.file}:{row.line}", "data.task=exact_match"))
    if problems:
        raise RecipeError(shown_problems(problems))


def _content_hash(row: Conversation) -> str:
    digest = sha256()
    for message in row.messages:
        for part in (message.role, message.content):
            digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def _summary(rows: list[TokenRow], path: Path, row_format: RowFormat, dropped: int) -> FileSummary:
    tokens = sum(len(row.input_ids) for row in rows)
    trained = sum(sum(row.trained) for row in rows)
    return FileSummary(
        file=str(path),
        sha256=file_hash(path),
        format=row_format.name,
        rows=len(rows),
        dropped_rows=dropped,
        tokens=tokens,
        trained_tokens=trained,
        trained_share=round(trained / tokens, 4),
        longest_row=max(len(row.input_ids) for row in rows),
    )


def _named_lines(lines: Iterable[int]) -> str:
    every = list(lines)
    named = ", ".join(str(line) for line in every[:MOST_LINES_NAMED])
    more = f" and {len(every) - MOST_LINES_NAMED} more" if len(every) > MOST_LINES_NAMED else ""
    return f"line{'s' if len(every) > 1 else ''} {named}{more}"
