"""What columns of other names probably hold, as the line to paste; and preference rows, which are not trained."""

from collections.abc import Iterable, Mapping, Sequence

from qlora_kit.core.shell import hydra_text, shell_line
from qlora_kit.data.formats.bad_rows import BadRowError, listed

# What others call our fields, the likeliest first; compared without case, blanks, - and _.
_ASKED = ("question", "query", "instruction", "input", "user", "problem", "request", "human")
_ANSWERED = ("answer", "response", "output", "solution", "assistant", "target", "reply", "completion")
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "usermessage", "userprompt", "inputtext", *_ASKED),
    "completion": ("assistantmessage", "modelresponse", "outputtext", "targettext", "answers", *_ANSWERED),
    "instruction": ("question", "prompt", "query", "task", "request"),
    "output": ("response", "answer", "completion", "target", "solution", "reply"),
    "text": ("content", "body", "document", "passage", "article"),
}
# The answer that was liked less, by the column that holds it -> the column of the other one.
_PAIRS = {
    "rejected": "chosen",
    "rejected_response": "chosen_response",
    "response_rejected": "response_chosen",
    "answer_rejected": "answer_chosen",
    "rejected_answer": "chosen_answer",
    "non_preferred_output": "preferred_output",
    "dispreferred": "preferred",
    "lose": "win",
    "worse": "better",
}
REJECTED = frozenset(_PAIRS)


def columns_line(fields: Mapping[str, str]) -> str:
    """The override that says which column holds which field."""
    return shell_line(
        ["data.columns={" + ", ".join(f"{ours}: {hydra_text(name)}" for ours, name in fields.items()) + "}"]
    )


def guessed_columns(row: Mapping[str, object], fields: Sequence[str]) -> str:
    """The override that names the columns of some fields; empty where not each can be guessed."""
    turns = next((name for name, value in row.items() if _is_turns(value)), None)
    if turns is not None:
        return columns_line({"messages": turns})
    by_word = {_word(name): name for name, value in reversed(list(row.items())) if isinstance(value, str | list)}
    guessed: dict[str, str] = {}
    for field in fields:
        named = [by_word[word] for word in OTHER_NAMES.get(field, ()) if word in by_word]
        free = [name for name in named if name not in guessed.values()]
        if not free:
            return ""
        guessed[field] = free[0]
    return columns_line(guessed)


def likely_column(field: str, names: Iterable[str]) -> str:
    """The column that probably holds a field, by its name alone; empty where none is called as others call it."""
    by_word = {_word(name): name for name in names}
    return next((by_word[word] for word in OTHER_NAMES.get(field, ()) if word in by_word), "")


def refuse_preference(row: Mapping[str, object], renamed: Mapping[str, str]) -> None:
    """Refuse a row that holds an answer to be preferred over another, unless the recipe says which column to train.

    Raises:
        BadRowError: with the columns that would train the preferred answers.
    """
    worse = next((name for name in _PAIRS if row.get(name)), None)
    if worse is None or not renamed.keys().isdisjoint(("completion", "output", "messages", "text")):
        return
    better = _PAIRS[worse]
    raise BadRowError(
        f"a preference row ({better} and {worse}), which is not supported: supervised fine-tuning learns one answer; "
        f"the row has {listed(row)}",
        _chosen_alone(row, better),
    )


def _chosen_alone(row: Mapping[str, object], better: str) -> str:
    """The override that trains the preferred answer alone; empty where columns cannot say it."""
    chosen = row.get(better)
    if not chosen:
        kept = next((name for name in ("messages", "conversations") if _is_turns(row.get(name))), None)
        return columns_line({"messages": kept}) if kept else ""
    if _is_turns(chosen) and len(chosen) > 1:  # type: ignore[arg-type]  # a list, as `_is_turns` says
        return columns_line({"messages": better})
    asked = row.get("input")
    if _is_turns(chosen) and isinstance(asked, dict) and _is_turns(asked.get("messages")):
        return columns_line({"prompt": "input.messages", "completion": better})
    if isinstance(row.get("instruction"), str) and isinstance(chosen, str):
        return columns_line({"instruction": "instruction", "output": better})
    names = [name for name in OTHER_NAMES["prompt"] if isinstance(row.get(name), type(chosen))]
    return columns_line({"prompt": names[0], "completion": better}) if names else ""


def _is_turns(value: object) -> bool:
    """Whether a value is a list of turns, each with its speaker and its text."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return value[0].keys() >= {"role", "content"} or value[0].keys() >= {"from", "value"}


def is_one_turn(row: Mapping[str, object]) -> bool:
    """Whether a row is one turn of a conversation rather than a whole one."""
    return _is_turns([row])


def _word(name: str) -> str:
    return "".join(char for char in name.casefold() if char not in " -_.")
