"""Recipe group `data`: the rows, how they are read, and which of them are held out."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import MISSING, Sealed, knob


class RowFormat(Enum):
    """How a JSONL row holds a conversation."""

    auto = "auto"
    messages = "messages"
    prompt_completion = "prompt_completion"


class LongRows(Enum):
    """What happens to a row longer than `data.max_tokens`."""

    error = "error"
    drop = "drop"


class Task(Enum):
    """How an answer is judged."""

    none = "none"
    exact_match = "exact_match"
    json_exact_match = "json_exact_match"


@dataclass
class DataConfig(Sealed):
    """Training and held-out rows."""

    train_file: str = knob(MISSING, "JSONL of training rows.")
    eval_file: str | None = knob(None, "JSONL of held-out rows; never trained on, used to score.")
    format: RowFormat = knob(RowFormat.auto, "Row format; auto recognises it from the rows and says so.")
    apply_chat_template: bool = knob(True, "Render prompt/completion rows as a chat; false joins them as plain text.")
    max_tokens: int = knob(MISSING, "Longest row.", unit="tokens", minimum=2)
    on_long_row: LongRows = knob(LongRows.error, "A longer row: stop with its line, or drop and count it.")
    train_rows: int | None = knob(None, "Use only this many training rows, from the top.", minimum=1)
    eval_rows: int | None = knob(None, "Use only this many held-out rows, from the top.", minimum=1)
    task: Task = knob(Task.none, "How generated answers are judged on held-out rows.")
