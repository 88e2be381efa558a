"""Recipe group `data`: the rows, how they are read and masked, how long they may be, and which are held out."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import MISSING, Sealed, setting

AUTO = "auto"
HOLD_OUT = "data.eval_share=0.02"  # as in the shipped experiments
HOLD_OUT_INSTEAD = f"data.eval_file=null {HOLD_OUT}"
ROLES = ("system", "developer", "user", "assistant", "tool")
# What `data.columns` may name: our fields of a row, and of an entry in its list of turns.
FIELDS = (
    *("messages", "role", "content", "tools", "system", "chat_template_kwargs"),
    *("instruction", "input", "output", "history", "prompt", "completion", "text"),
)


class RowFormat(Enum):
    """How a row holds a conversation."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"


class OnBadRow(Enum):
    """What happens to a row that cannot be read."""

    error = "error"
    skip = "skip"


class TrainOn(Enum):
    """Which tokens the loss sees."""

    assistant = "assistant"
    last = "last"
    chosen = "chosen"
    completion = "completion"
    everything = "everything"


class Overflow(Enum):
    """What happens to a row longer than `data.max_tokens`."""

    error = "error"
    drop = "drop"
    truncate_end = "truncate_end"
    truncate_prompt = "truncate_prompt"
    split_turns = "split_turns"


class Batching(Enum):
    """How rows become batches."""

    padded = "padded"
    by_length = "by_length"
    packed = "packed"


class Task(Enum):
    """How an answer is judged."""

    none = "none"
    exact_match = "exact_match"
    json_exact_match = "json_exact_match"


@dataclass
class SourceConfig(Sealed):
    """One source of a mix."""

    path: str = setting(MISSING, "A file, a glob, a folder that `datasets` saved, or a hub id with a revision.")
    revision: str | None = setting(None, "Commit of a hub id, so that a run can be repeated.")
    subset: str | None = setting(None, "Configuration of a hub id.")
    split: str = setting("train", "Split of a hub id or a saved folder.")
    format: RowFormat = setting(RowFormat.auto, "Row format of this source.")
    rows: int | None = setting(None, "Take this many rows, drawn with the seed.", minimum=1)
    weight: float | None = setting(None, "Share of the mix, relative to the other weights.", above=0)


@dataclass
class DataConfig(Sealed):
    """Training and held-out rows."""

    train_file: str | None = setting(None, "Training rows: a file, a glob, or a folder that `datasets` saved.")
    sources: dict[str, SourceConfig] = setting({}, "A mix of named sources, instead of train_file.")
    eval_file: str | None = setting(None, "Held-out rows; never trained on, used to score.")
    eval_share: float | None = setting(
        None, "Without eval_file: hold out this share of the training rows, at least one.", above=0, maximum=0.5
    )
    format: RowFormat = setting(RowFormat.auto, "Row format; auto recognizes it from the rows and says so.")
    columns: dict[str, str] = setting({}, "Our field -> your column, such as {prompt: question, completion: answer}.")
    roles: dict[str, str] = setting({}, "Your role -> ours, such as {customer: user, agent: assistant}.")
    apply_chat_template: bool = setting(
        True, "Render prompt/completion rows as a chat; false joins them as plain text."
    )
    train_on: TrainOn = setting(
        TrainOn.assistant,
        "Loss tokens: every assistant turn, the last one, those a row flags (train: true), the completion, or all.",
    )
    max_tokens: int | str = setting(
        MISSING, "Longest row, or auto: the longest that the plan says fits.", unit="tokens"
    )
    overflow: Overflow = setting(
        Overflow.error,
        "A longer row: stop, drop it, truncate its end, truncate its prompt from the left, or split it between turns.",
    )
    batching: Batching = setting(
        Batching.padded,
        "Rows padded as they come, grouped by length, or packed into bins of max_tokens with isolated attention.",
    )
    on_bad_row: OnBadRow = setting(OnBadRow.error, "A row that cannot be read: stop, or skip and report it.")
    max_bad_share: float = setting(0.01, "Skipped rows above this share stop the run.", minimum=0, maximum=1)
    train_rows: int | None = setting(None, "Use only this many training rows, from the top.", minimum=1)
    eval_rows: int | None = setting(
        None,
        "Held-out rows: at most this many of eval_file or of eval_share; without either, this many training rows.",
        minimum=1,
    )
    seed: int = setting(0, "Seed of the mix and of the held-out split.", minimum=0, maximum=2**32 - 1)
    processes: int | None = setting(None, "Processes that tokenize; unset: one for each CPU.", minimum=1)
    cache: bool = setting(True, "Keep tokenized rows in the user's cache, so that the next run starts at once.")
    task: Task = setting(Task.none, "How generated answers are judged on held-out rows.")

    @property
    def holds_out(self) -> bool:
        """Whether any rows are held out."""
        return self.eval_file is not None or self.eval_share is not None or self.eval_rows is not None


@dataclass
class LaterRows(Sealed):
    """Held-out rows that a finished run is given; they are read with the settings of its own rows."""

    eval_file: str | None = setting(None, "Held-out rows to score a run on, instead of its own.")
    eval_rows: int | None = setting(None, "Take at most this many of them.", minimum=1)
