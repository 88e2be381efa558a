"""One row of any known format -> a conversation, or the reason why not."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.formats.bad_rows import BadRowError, json_text, kind, unsupported, whole_text
from qlora_kit.data.formats.chat_rows import OPENAI_ROLES, PARTS_JOINED, SHAREGPT_ROLES, TurnReader
from qlora_kit.data.formats.columns import Columns, recognize
from qlora_kit.data.formats.guesses import REJECTED, refuse_preference
from qlora_kit.data.formats.tool_calls import check_answered_calls, tools
from qlora_kit.data.formats.turn_order import check_order, with_choices
from qlora_kit.schema.data import RowFormat, TrainOn

__all__ = ["BadRowError", "RowReader", "recognize"]

# Columns that change what a row means to the model; other columns are notes of the user's.
_MEANINGFUL = frozenset(
    ("tools", "system", "chat_template_kwargs", "functions", "tool_calls", "function_call", "documents")
) | {"image", "images", "videos", "audios"}
_NEED_TEMPLATE = {
    RowFormat.messages: "messages need",
    RowFormat.sharegpt: "conversations need",
    RowFormat.alpaca: "instruction/output rows need",
}
_NO_COMPLETION = {
    RowFormat.messages: "data.train_on=last",
    RowFormat.sharegpt: "data.train_on=last",
    RowFormat.text: "data.train_on=everything",
}


@dataclass(frozen=True)
class _Turns:
    """Turns of a row before its settings are added; the turns before `trained_from` are prompt."""

    messages: tuple[Message, ...]
    flags: AbstractSet[str] = frozenset()
    trained_from: int = 0


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one format; small and picklable, so that worker processes can have it.

    Attributes:
        format: how the rows hold a conversation; not `auto`.
        columns: our field -> their column; a dotted path reaches into nested objects.
        roles: their role -> ours.
        apply_chat_template: False joins prompt and completion as plain text.
        train_on: decides which flags mean something.
        joint: between two text parts of one message, as the template or a server puts it.
    """

    format: RowFormat
    columns: Mapping[str, str]
    roles: Mapping[str, str]
    apply_chat_template: bool
    train_on: TrainOn
    joint: str = "\n"

    def conversation(self, row: Mapping[str, object], file: str, line: int) -> Conversation:
        """What the row says.

        Args:
            file, line: where the row stands; line or row number from 1.

        Raises:
            BadRowError: the row cannot be used whole; nothing in it that changes its meaning is left out.
        """
        if self._refusal:
            raise BadRowError(self._refusal)
        if not REJECTED.isdisjoint(row):
            refuse_preference(row, self.columns)
        self._where.require(row)
        if not self._refused.isdisjoint(row):
            for key in sorted(self._refused & row.keys()):
                if row[key]:
                    raise unsupported(f"'{key}'")
        if self.format is RowFormat.text:
            return Conversation(self._text(row), file, line, plain=True)
        read = _READERS[self.format](self, row)
        messages = self._with_system(row, read.messages)
        start = read.trained_from + len(messages) - len(read.messages) if read.trained_from else 0
        check_order(messages)
        check_answered_calls(messages)
        messages = with_choices(messages, read.flags - {PARTS_JOINED}, self.train_on)
        notes = (PARTS_JOINED,) if PARTS_JOINED in read.flags else ()
        if not self.apply_chat_template:
            return Conversation(messages, file, line, plain=True, notes=notes)
        found = self._where.value(row, "tools")
        functions = tools(found, self._where.name(row, "tools")) if found else ()
        return Conversation(messages, file, line, False, start, functions, self._settings(row), notes)

    def unused(self, row: Mapping[str, object]) -> set[str]:
        """Columns that carry nothing that is read: notes of the user's."""
        return self._where.unused(row) - _MEANINGFUL

    @cached_property
    def _where(self) -> Columns:
        return Columns(self.format, self.columns)

    @cached_property
    def _refused(self) -> frozenset[str]:
        is_plain = self.format is RowFormat.text or not self.apply_chat_template
        return _MEANINGFUL - set(self.columns.values()) if is_plain else _MEANINGFUL - self._where.read

    @cached_property
    def _refusal(self) -> str:
        """Why no row of this format can be used at all; empty where rows can be."""
        if self.train_on is TrainOn.completion and self.format in _NO_COMPLETION:
            return f"data.train_on=completion is for prompt/completion rows; use {_NO_COMPLETION[self.format]}"
        if not self.apply_chat_template and self.format in _NEED_TEMPLATE:
            return f"{_NEED_TEMPLATE[self.format]} a chat template; only prompt/completion does without"
        return ""

    @cached_property
    def _turns(self) -> TurnReader:
        is_sharegpt = self.format is RowFormat.sharegpt
        role, content = ("from", "value") if is_sharegpt else ("role", "content")
        known = SHAREGPT_ROLES if is_sharegpt else OPENAI_ROLES
        return TurnReader(
            self.columns.get("role", role), self.columns.get("content", content), {**known, **self.roles}, self.joint
        )

    def _chat(self, row: Mapping[str, object]) -> _Turns:
        flags: set[str] = set()
        where = self._where
        return _Turns(self._turns.turns(where.value(row, "messages"), where.name(row, "messages"), flags), flags)

    def _pair(self, row: Mapping[str, object]) -> _Turns:
        where = self._where
        prompt, completion = where.value(row, "prompt"), where.value(row, "completion")
        names = where.name(row, "prompt"), where.name(row, "completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            asked, answer = whole_text(prompt, names[0]), whole_text(completion, names[1])
            return _Turns((Message("user", asked), Message("assistant", answer)))
        if isinstance(prompt, list) and isinstance(completion, list):
            if not self.apply_chat_template:
                raise BadRowError(
                    f"{names[0]} and {names[1]} are lists of messages, which need data.apply_chat_template=true"
                )
            flags: set[str] = set()
            before = self._turns.turns(prompt, names[0], flags)
            return _Turns(before + self._turns.turns(completion, names[1], flags), flags, len(before))
        raise BadRowError(
            f"{names[0]} and {names[1]} must both be strings or both be lists of messages, "
            f"not {kind(prompt)} and {kind(completion)}"
        )

    def _alpaca(self, row: Mapping[str, object]) -> _Turns:
        before = self._history(row)
        asked, given = self._string(row, "instruction"), self._string(row, "input")
        if given.strip():
            asked = f"{asked}\n{given}" if asked else given
        messages = (*before, Message("user", asked), Message("assistant", self._string(row, "output")))
        # The completion of such a row is its output; answers of the history are trained only with the other choices.
        start = len(before) + 1 if before and self.train_on is TrainOn.completion else 0
        return _Turns(messages, trained_from=start)

    def _history(self, row: Mapping[str, object]) -> tuple[Message, ...]:
        value, name = self._where.value(row, "history"), self._where.name(row, "history")
        if not value:
            return ()
        if not isinstance(value, list):
            raise BadRowError(f"{name} must be a list of [question, answer], not {kind(value)}")
        messages: list[Message] = []
        for index, pair in enumerate(value):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadRowError(f"{name}[{index}] must be [question, answer], two strings")
            asked, answer = (whole_text(text, f"{name}[{index}]") for text in pair)
            messages += [Message("user", asked), Message("assistant", answer)]
        return tuple(messages)

    def _text(self, row: Mapping[str, object]) -> tuple[Message, ...]:
        text = self._string(row, "text")
        if not text.strip():
            raise BadRowError(f"{self._where.name(row, 'text')} is empty")
        return (Message("assistant", text),)

    def _string(self, row: Mapping[str, object], field: str) -> str:
        value, name = self._where.value(row, field), self._where.name(row, field)
        if value is None and field == "input":
            return ""
        if not isinstance(value, str):
            raise BadRowError(f"{name} must be a string, not {kind(value)}")
        return whole_text(value, name)

    def _with_system(self, row: Mapping[str, object], messages: tuple[Message, ...]) -> tuple[Message, ...]:
        value = self._where.value(row, "system")
        if not value or not self.apply_chat_template:
            return messages
        name = self._where.name(row, "system")
        if not isinstance(value, str):
            raise BadRowError(f"{name} must be a string, not {kind(value)}")
        fronts = [message.content for message in messages if message.role in ("system", "developer")]
        if fronts == [value]:
            return messages
        if fronts:
            raise BadRowError(f"the row has a system turn and another text in '{name}'; keep one")
        return (Message("system", whole_text(value, name)), *messages)

    def _settings(self, row: Mapping[str, object]) -> Mapping[str, object] | None:
        value, name = self._where.value(row, "chat_template_kwargs"), self._where.name(row, "chat_template_kwargs")
        if not value:
            return None
        if not isinstance(value, dict):
            raise BadRowError(f"{name} must be an object, not {kind(value)}")
        json_text(value, name)
        return value


_READERS: Mapping[RowFormat, Callable[[RowReader, Mapping[str, object]], _Turns]] = {
    RowFormat.messages: RowReader._chat,
    RowFormat.sharegpt: RowReader._chat,
    RowFormat.alpaca: RowReader._alpaca,
    RowFormat.prompt_completion: RowReader._pair,
}
