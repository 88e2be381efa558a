"""Laws that the turns of a row obey: who follows whom, no empty answer, and flags that leave nothing open."""

from collections.abc import Set as AbstractSet
from dataclasses import replace

from qlora_kit.data.conversation import Message
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.schema.data import TrainOn

_FRONT = frozenset({"", "system", "developer"})
_MAY_FOLLOW = {
    "system": _FRONT,
    "developer": _FRONT,
    "user": _FRONT | {"assistant"},
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}
_EXPECTED = "an optional system, then user and assistant in turn, and tool turns only after an assistant's call"


def check_order(messages: tuple[Message, ...]) -> None:
    """Refuse turns that no chat has in this order, and answers that say nothing.

    Raises:
        BadRowError: naming the roles, or the turn.
    """
    before, may_answer = "", False
    in_order = True
    for message in messages:
        role = message.role
        if before not in _MAY_FOLLOW[role] or (role == "tool" and not may_answer):
            in_order = False
            break
        if role != "tool":
            may_answer = bool(message.tool_calls)
        before = role
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadRowError("no assistant turn, so nothing to train on")
    if not in_order:
        raise BadRowError(f"roles out of order: {', '.join(roles)}; expected {_EXPECTED}")
    if roles[-1] != "assistant":
        raise BadRowError(f"the last turn is the {roles[-1]}'s; it must be the assistant's")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.tool_calls and not message.content.strip():
            raise BadRowError(f"the assistant's answer (turn {index + 1}) is empty")


def with_choices(messages: tuple[Message, ...], flags: AbstractSet[str], train_on: TrainOn) -> tuple[Message, ...]:
    """The turns with `is_chosen` settled for every assistant turn where `data.train_on=chosen`.

    Args:
        flags: kinds of flags that the row carries, `train` or `weight`.

    Raises:
        BadRowError: flags that only `chosen` reads, none where it needs them, or flags that leave a turn open.
    """
    if train_on is not TrainOn.chosen:
        _refuse_flags(messages, flags)
        return messages
    if not flags:
        raise BadRowError("no turn carries train: true or false, or weight: 0 or 1, which data.train_on=chosen needs")
    if len(flags) > 1:
        raise BadRowError("the row carries both train and weight flags; keep one kind")
    unflagged = True if "weight" in flags else _opposite(messages)
    return tuple(
        replace(message, is_chosen=unflagged) if message.role == "assistant" and message.is_chosen is None else message
        for message in messages
    )


def _refuse_flags(messages: tuple[Message, ...], flags: AbstractSet[str]) -> None:
    if not flags:
        return
    for index, message in enumerate(messages):
        if message.is_chosen is None or ("train" not in flags and message.is_chosen):
            continue
        flag = "a train flag" if "train" in flags else "weight: 0"
        raise BadRowError(f"turn {index + 1} carries {flag}, which only data.train_on=chosen reads")


def _opposite(messages: tuple[Message, ...]) -> bool:
    """What a turn without a `train` flag means: the opposite of those that have one."""
    said = {message.is_chosen for message in messages if message.role == "assistant"}
    if said == {True, False, None}:
        open_turns = [
            str(index + 1)
            for index, message in enumerate(messages)
            if message.role == "assistant" and message.is_chosen is None
        ]
        raise BadRowError(
            f"a row with both train: true and train: false must flag every assistant turn; "
            f"turn {', '.join(open_turns)} has no flag"
        )
    return True not in said
