"""Recipe group `data` -> token rows ready to train and to score, with the numbers that data.json records."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.encode import Encoder
from qlora_kit.data.formats.absent import COLUMNS
from qlora_kit.data.lengths import describe_long_rows, truncate_or_drop
from qlora_kit.data.problems import MOST_PROBLEMS_SHOWN, several_shapes, told_once
from qlora_kit.data.split import held_out, mixed, shared_rows
from qlora_kit.data.summary import DataSummary, LongRowCounts, SourceSummary, SplitSummary
from qlora_kit.data.tokenized import EVAL_FILE, NamedSource, Tokenized, tokenized
from qlora_kit.data.tokens import Ints, TokenRow, TokenRows, TokenStore
from qlora_kit.schema.data import AUTO, HOLD_OUT_INSTEAD, DataConfig, LaterRows, OnBadRow, SourceConfig, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN, HELD_OUT = "train", "held out"


@dataclass(frozen=True)
class HeldOutRows:
    """Token rows to score on, and where their conversations are read; None where nothing is held out."""

    held_out: TokenRows | None
    held_out_source: Tokenized

    def scored(self, limit: int) -> Sequence[TokenRow]:
        """The first held-out rows; none where a recipe holds nothing out."""
        return [] if self.held_out is None else self.held_out[:limit]

    def held_out_conversations(self, limit: int | None = None) -> list[Conversation]:
        """The conversations of the first held-out rows, read again from their files; of a split row once."""
        if self.held_out is None:
            return []
        return self.held_out_source.conversations(np.unique(self.held_out.rows)[:limit])


@dataclass(frozen=True)
class PreparedData(HeldOutRows):
    """Token rows of both splits; no held-out ones where a recipe holds nothing out."""

    train: TokenRows
    summary: DataSummary


def prepare(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", max_tokens: "int | Callable[[int], int] | None" = None
) -> PreparedData:
    """Read, check, render, tokenize and split the rows of a recipe.

    Args:
        max_tokens: what `data.max_tokens=auto` came to, or what tells it from the length of the longest training row;
            None takes rows of any length then.

    Raises:
        RecipeError: a source or row cannot be used, a row is too long for `overflow=error`, or a held-out row is
            also trained on. Problems of both splits are reported together.
    """
    encoder = Encoder.of(tokenizer, config.train_on)
    train_source, eval_source = _read_both(config, encoder)
    rows = mixed(train_source.store, config.sources or {TRAIN: SourceConfig(path="")}, config.seed)
    if eval_source is not None:
        out_source = eval_source
        out: Ints = np.arange(len(eval_source.store), dtype=np.int64)
        _tell_of_eval_file(config, eval_source)
        _refuse_overlap(train_source.store, rows, eval_source)
    else:
        out_source, (rows, out) = train_source, _split(config, train_source, rows)
    limit: int | None
    if config.max_tokens != AUTO:
        limit = int(config.max_tokens)
    else:
        limit = max_tokens(int(train_source.store.lengths.max())) if callable(max_tokens) else max_tokens
    train, train_summary = _fitted(TRAIN, train_source, rows, config, limit, encoder.bos)
    if not len(out):
        return PreparedData(None, train_source, train, DataSummary(train_summary, None))
    held, held_summary = _fitted(HELD_OUT, out_source, out, config, limit, encoder.bos)
    data = PreparedData(held, out_source, train, DataSummary(train_summary, held_summary))
    _check_task(config.task, data)
    return data


def later_rows(
    later: LaterRows, config: DataConfig, tokenizer: "PreTrainedTokenizerFast", limit: int, train: TokenRows | None
) -> HeldOutRows:
    """Held-out rows of a file that is given after training, read with the settings of the training rows.

    Args:
        limit: what `data.max_tokens` came to.
        train: the training rows; None where they cannot be read any more, so that nothing is compared with them.

    Raises:
        RecipeError: the rows cannot be used, or some of them were trained on.
    """
    encoder = Encoder.of(tokenizer, config.train_on)
    named = NamedSource(HELD_OUT, SourceConfig(path=later.eval_file or ""), EVAL_FILE, later.eval_rows)
    try:
        source = tokenized([named], config, encoder)
        _judge_bad_rows(source, config, may_skip=False)
    except RecipeError as error:
        fix = f"give the rows of {named.config.path} the columns that the training rows have"
        raise RecipeError([_for_eval_file(problem, fix) for problem in error.problems]) from error
    _tell(source)
    _tell_of_eval_file(replace(config, eval_file=later.eval_file, eval_share=None, eval_rows=later.eval_rows), source)
    if train is not None:
        _refuse_overlap(train.store, np.unique(train.rows), source)
    rows, _ = _fitted(HELD_OUT, source, np.arange(len(source.store), dtype=np.int64), config, limit, encoder.bos)
    held = HeldOutRows(rows, source)
    _check_task(config.task, held)
    return held


def _read_both(config: DataConfig, encoder: Encoder) -> tuple[Tokenized, Tokenized | None]:
    train = [
        NamedSource(name, source, f"data.sources.{name}.path", None) for name, source in config.sources.items()
    ] or [NamedSource(TRAIN, SourceConfig(path=config.train_file or ""), "data.train_file", config.train_rows)]
    wanted = [train]
    if config.eval_file is not None:
        wanted.append([NamedSource(HELD_OUT, SourceConfig(path=config.eval_file), EVAL_FILE, config.eval_rows)])
    read: list[Tokenized] = []
    problems: list[Problem] = []
    for sources in wanted:
        try:
            split = tokenized(sources, config, encoder)
            _judge_bad_rows(split, config)
            read.append(split)
        except RecipeError as error:
            told = error.problems
            problems.extend(_for_eval_file(one, HOLD_OUT_INSTEAD) if read else one for one in told)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    for split in read:
        _tell(split)
    return read[0], read[1] if len(read) > 1 else None


def _for_eval_file(problem: Problem, fix: str) -> Problem:
    """A problem of held-out rows where training rows have none: what holds for both must not be set for these alone."""
    if problem.where != COLUMNS and not re.search(r"\bdata\.(columns|format)=", problem.fix):
        return problem
    return replace(problem, what=f"{problem.what}; held-out rows need the columns of the training rows", fix=fix)


def _or_skip(problem: Problem) -> Problem:
    """A problem of few rows, whose fix is to leave them out where it has none of its own."""
    return problem if problem.fix or not problem.where else replace(problem, fix="data.on_bad_row=skip")


def _judge_bad_rows(split: Tokenized, config: DataConfig, *, may_skip: bool = True) -> None:
    """Bad rows stop the run, or are skipped, counted and shown as far as the recipe allows.

    Args:
        may_skip: whether the command line may still set `data.on_bad_row`.
    """
    store, bad = split.store, sum(split.store.bad_row_counts.values())
    problems = [Problem(row.why, f"{row.file}:{row.line}", row.fix) for row in store.bad_rows]
    told = several_shapes(
        told_once(problems, store.bad_row_sorts), store.bad_row_sorts, {file.format for file in store.files}, len(store)
    )
    share = bad / max(1, bad + len(store))
    if bad and config.on_bad_row is OnBadRow.error:
        is_few = may_skip and share <= config.max_bad_share
        raise RecipeError([_or_skip(problem) if is_few else problem for problem in told])
    if share > config.max_bad_share:
        rows = f"{bad:,} of {counted(bad + len(store), 'row')}"
        what = f"{rows} cannot be read ({share:.1%}), more than data.max_bad_share allows"
        raise RecipeError(
            [
                Problem(what, "data.max_bad_share", f"data.max_bad_share={share:.3f}"),
                *told,
            ]
        )
    for name, count in store.bad_row_counts.items():
        if count:
            log.info(
                f"{name}: skipped {counted(count, 'row')} that cannot be read, the first: {problems[0].where}: "
                f"{problems[0].what}"
            )
    if not len(store):
        raise RecipeError(
            f"{', '.join(file.path for file in store.files)} holds no rows",
            fix='one JSON object a line, such as {"prompt": "...", "completion": "..."}',
        )


def _tell(split: Tokenized) -> None:
    for opened in split.opened:
        for name, remark in opened.source.remarks().items():
            log.info(f"{name}: read as {remark}")
    for file in split.store.files:
        if split.is_recognized(file.source):
            log.info(f"{file.path}: rows recognized as {file.format}")
    for name, columns in split.unused_columns.items():
        log.info(f"{name}: columns that are not used: {', '.join(sorted(columns))}")


def _tell_of_eval_file(config: DataConfig, source: Tokenized) -> None:
    """Say what of a recipe gives way to `data.eval_file`, which the user named in its place."""
    if config.eval_share is not None:
        log.info(f"held-out rows come from data.eval_file, so data.eval_share={config.eval_share:g} holds out none")
    if len(source.store) == config.eval_rows:
        log.info(
            f"held out: the first {counted(config.eval_rows, 'row')} of {config.eval_file}; data.eval_rows=null takes "
            "all of them"
        )


def _split(config: DataConfig, source: Tokenized, rows: Ints) -> tuple[Ints, Ints]:
    if config.eval_share is None and config.eval_rows is None:
        return rows, np.zeros(0, dtype=np.int64)
    train, out, copies = held_out(source.store, rows, config.eval_share, config.eval_rows, config.seed)
    left_out = f"; left out {counted(copies, 'copy', 'copies')} of them" if copies else ""
    about = _about_the_share(config, len(out), len(rows))
    log.info(f"held out {len(out):,} of {counted(len(rows), 'row')}{left_out}{about}")
    return train, out


def _about_the_share(config: DataConfig, count: int, rows: int) -> str:
    """Why the share of the rows is not exactly what was asked for; empty where it is, or where `eval_rows` was less."""
    if config.eval_share is None or count in (max(1, round(config.eval_share * rows)), config.eval_rows):
        return ""
    return f"; data.eval_share={config.eval_share:g} picks rows by their content, so it holds out about that share"


def _fitted(
    name: str, source: Tokenized, rows: Ints, config: DataConfig, limit: int | None, bos: int | None
) -> tuple[TokenRows, SplitSummary]:
    whole = TokenRows.whole(source.store, rows)
    longest = int(whole.lengths.max())
    if limit is None:
        return whole, _summary(whole, source, longest, LongRowCounts())
    kept, counts = truncate_or_drop(whole, limit, config.overflow, bos)
    for line in describe_long_rows(counts, name, config.overflow, limit):
        log.info(line)
    return kept, _summary(kept, source, limit, counts)


def _refuse_overlap(train: TokenStore, rows: Ints, other: Tokenized) -> None:
    shared = shared_rows(train, rows, other.store, np.arange(len(other.store), dtype=np.int64))
    if not shared:
        return
    named = [f"{other.store.place(mine)} (training {train.place(theirs)})" for mine, theirs in shared]
    more = f" and {len(shared) - MOST_PROBLEMS_SHOWN} more" if len(shared) > MOST_PROBLEMS_SHOWN else ""
    raise RecipeError(
        f"{counted(len(shared), 'held-out row is also a training row', 'held-out rows are also training rows')}, so "
        f"their score would say nothing: {', '.join(named[:MOST_PROBLEMS_SHOWN])}{more}",
        where=EVAL_FILE,
        fix="take those rows out of the training file, or data.eval_file=<other rows>",
    )


def _check_task(task: Task, data: HeldOutRows) -> None:
    """Refuse held-out answers that the task cannot judge, before anything is trained."""
    problems = []
    for row in data.held_out_conversations() if task is Task.json_exact_match else []:
        try:
            json.loads(row.messages[-1].content)
        except (ValueError, RecursionError):  # a number of 5,000 digits is a plain ValueError
            what = "data.task=json_exact_match, but this held-out answer is not JSON"
            problems.append(Problem(what, row.place, "data.task=exact_match"))
    if problems:
        raise RecipeError(told_once(problems))


def _summary(rows: TokenRows, source: Tokenized, max_tokens: int, counts: LongRowCounts) -> SplitSummary:
    tokens, trained = int(rows.lengths.sum()), int(rows.trained_counts.sum())
    return SplitSummary(
        rows=len(rows),
        tokens=tokens,
        trained_tokens=trained,
        trained_share=round(trained / tokens, 4),
        longest_row=int(rows.lengths.max()),
        max_tokens=max_tokens,
        long_rows=counts,
        sources=list(_sources(rows, source)),
        skipped=source.store.bad_rows,
    )


def _sources(rows: TokenRows, source: Tokenized) -> Iterator[SourceSummary]:
    store = source.store
    of_row = np.array([file.source for file in store.files])[store.table.files[rows.rows]]
    for name in dict.fromkeys(file.source for file in store.files):
        mine = of_row == name
        tokens, trained = int(rows.lengths[mine].sum()), int(rows.trained_counts[mine].sum())
        files = [file for file in store.files if file.source == name]
        yield SourceSummary(
            name=name,
            sha256={file.path: file.sha256 for file in files},
            formats=sorted({file.format for file in files}),
            rows=int(mine.sum()),
            bad_rows=store.bad_row_counts.get(name, 0),
            tokens=tokens,
            trained_tokens=trained,
            trained_share=round(trained / tokens, 4) if tokens else 0.0,
        )
