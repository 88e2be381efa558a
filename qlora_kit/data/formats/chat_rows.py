"""Entries of a `messages` or `conversations` list -> typed turns."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_kit.core.shell import hydra_text, shell_line
from qlora_kit.core.terminal import one_line
from qlora_kit.data.conversation import Message, ToolCall
from qlora_kit.data.formats.bad_rows import BadRowError, json_reason, kind, listed, unsupported, whole_text
from qlora_kit.data.formats.tool_calls import calls_from_text, tool_calls
from qlora_kit.schema.data import ROLES

PARTS_JOINED = "parts_joined"
CALLS_ROLE = "function_call"  # a ShareGPT turn that spells calls as JSON; it becomes an assistant turn
OPENAI_ROLES: Mapping[str, str] = {role: role for role in ROLES}
SHAREGPT_ROLES: Mapping[str, str] = {
    **OPENAI_ROLES,
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    CALLS_ROLE: CALLS_ROLE,
}

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
_EXTRAS = {
    "assistant": frozenset({"name", "tool_calls", "train", "weight", *_REASONING_KEYS}),
    "tool": frozenset({"name", "tool_call_id"}),
}
_NAME_ONLY = frozenset({"name"})


# What others call a speaker, so that the line to paste says what was meant.
_LIKELY_ROLES = {
    **dict.fromkeys(
        ("customer", "client", "caller", "patient", "student", "visitor", "prompter", "questioner"), "user"
    ),
    **dict.fromkeys(("agent", "ai", "advisor", "doctor", "teacher", "tutor", "operator", "support"), "assistant"),
    **dict.fromkeys(("instructions", "sys"), "system"),
    **dict.fromkeys(("function", "ipython", "tool_response", "tool_result"), "tool"),
}


class _UnknownRoleError(BadRowError):
    """A speaker that no table here knows."""


@dataclass(frozen=True)
class TurnReader:
    """Reads the entries of one list of turns.

    Attributes:
        role_key, content_key: what an entry calls its speaker and its text.
        roles: name of a role in the row -> one of ours, or `CALLS_ROLE`.
        joint: between two text parts of one message.
    """

    role_key: str
    content_key: str
    roles: Mapping[str, str]
    joint: str = "\n"

    def turns(self, value: object, name: str, flags: set[str]) -> tuple[Message, ...]:
        """The turns in order.

        Args:
            name: of the column, for errors.
            flags: gets `train` or `weight` where an assistant turn carries that key, and `PARTS_JOINED`.

        Raises:
            BadRowError: not a list, empty, or an entry that cannot be read whole.
        """
        if isinstance(value, str):
            value = _from_text(value, name)
        if not isinstance(value, list):
            raise BadRowError(f"{name} must be a list, not {kind(value)}")
        if not value:
            raise BadRowError(f"{name} is empty")
        try:
            turns = [self._turn(entry, name, index, flags) for index, entry in enumerate(value)]
        except _UnknownRoleError as error:
            raise BadRowError(str(error), self._named_roles(value)) from error
        return tuple(_with_calls_joined(turns, value, self.role_key))

    def _named_roles(self, entries: list[object]) -> str:
        """The override that says what every unknown role of a row is; empty where one cannot be told."""
        found = [entry.get(self.role_key) for entry in entries if isinstance(entry, dict)]
        unknown = list(dict.fromkeys(role for role in found if isinstance(role, str) and role not in self.roles))
        ours = [_LIKELY_ROLES.get(role.casefold(), "") for role in unknown]
        pairs = ", ".join(f"{hydra_text(role)}: {our}" for role, our in zip(unknown, ours, strict=True))
        return shell_line([f"data.roles={{{pairs}}}"]) if all(ours) else ""

    def _turn(self, entry: object, column: str, index: int, flags: set[str]) -> Message:
        # Most turns are a role and a text; the careful way costs several times as much.
        if isinstance(entry, dict) and len(entry) == 2:
            role, content = entry.get(self.role_key), entry.get(self.content_key)
            if isinstance(role, str) and isinstance(content, str) and content.isascii():
                ours = self.roles.get(role)
                if ours is not None and ours != CALLS_ROLE:
                    return Message(ours, content)
        return self._careful(entry, f"{column}[{index}]", flags)

    def _careful(self, entry: object, name: str, flags: set[str]) -> Message:
        if not isinstance(entry, dict):
            raise BadRowError(
                f"{name} must be an object with {self.role_key} and {self.content_key}, not {kind(entry)}"
            )
        role = self._role(entry, name)
        known = _EXTRAS.get("assistant" if role == CALLS_ROLE else role, _NAME_ONLY)
        for key, value in entry.items():
            if value and key not in known and key not in (self.role_key, self.content_key):
                raise unsupported(f"{name}.{key}")
        content, calls = self._content_and_calls(entry, role, name, flags)
        role = "assistant" if role == CALLS_ROLE else role
        is_assistant = role == "assistant"
        return Message(
            role,
            content,
            reasoning=_reasoning(entry, name) if is_assistant else "",
            tool_calls=calls,
            name=_optional_text(entry, "name", name),
            tool_call_id=_optional_text(entry, "tool_call_id", name) if role == "tool" else "",
            is_chosen=_flag(entry, name, flags) if is_assistant else None,
        )

    def _role(self, entry: Mapping[str, object], name: str) -> str:
        if self.role_key not in entry:
            raise BadRowError(f"{name} has no {self.role_key}; it has {listed(entry)}")
        role = entry[self.role_key]
        if not isinstance(role, str):
            raise BadRowError(f"{name}.{self.role_key} must be a string, not {kind(role)}")
        if role not in self.roles:
            raise _UnknownRoleError(
                f"{name} has the unknown role '{one_line(role)}'; known are {', '.join(self.roles)}; "
                f"data.roles says which of {', '.join(ROLES)} another one is"
            )
        return self.roles[role]

    def _content_and_calls(
        self, entry: Mapping[str, object], role: str, name: str, flags: set[str]
    ) -> tuple[str, tuple[ToolCall, ...]]:
        calls = tool_calls(entry.get("tool_calls"), f"{name}.tool_calls")
        value = entry.get(self.content_key)
        label = f"{name}.{self.content_key}"
        if role == CALLS_ROLE and isinstance(value, str):
            return "", calls_from_text(value, label)
        if role == CALLS_ROLE and isinstance(value, dict):
            return "", tool_calls([value], label)
        if value is None and calls:
            return "", calls
        if self.content_key not in entry:
            raise BadRowError(f"{name} has no {self.content_key}; it has {listed(entry)}")
        if isinstance(value, list) and len(value) > 1:
            flags.add(PARTS_JOINED)
        return _content(value, label, self.joint), calls


def _from_text(value: str, name: str) -> object:
    """A list of turns that a column holds as JSON text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        hint = ", though Python would print a list so" if value.lstrip().startswith("[{'") else ""
        raise BadRowError(f"{name} is a text and not JSON{hint}: {json_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{name} is a text and not JSON: nested too deep or a number too long") from error


def _with_calls_joined(turns: list[Message], entries: list[object], role_key: str) -> list[Message]:
    """The turns, with calls that a turn of their own spells joined to the assistant's text right before them."""
    joined: list[Message] = []
    for turn, entry in zip(turns, entries, strict=True):
        spells_calls = isinstance(entry, dict) and entry.get(role_key) == CALLS_ROLE
        before = joined[-1] if joined else None
        if spells_calls and before is not None and before.role == "assistant" and not before.tool_calls:
            joined[-1] = replace(before, tool_calls=turn.tool_calls)
        else:
            joined.append(turn)
    return joined


def _content(value: object, name: str, joint: str) -> str:
    if isinstance(value, str):
        return whole_text(value, name)
    if not isinstance(value, list):
        raise BadRowError(f"{name} must be a string, not {kind(value)}")
    return joint.join([_part(part, f"{name}[{index}]") for index, part in enumerate(value)])


def _part(part: object, name: str) -> str:
    if not isinstance(part, dict):
        raise BadRowError(f"{name} must be an object with type and text, not {kind(part)}")
    spoken = part.get("type")
    if not isinstance(spoken, str):
        raise BadRowError(f"{name}.type must be a string, not {kind(spoken)}")
    if spoken != "text":
        refused = "images are not supported, only text" if spoken in _IMAGE_PARTS else "only text is supported"
        raise BadRowError(f"{name} is a part of type '{spoken}'; {refused}")
    for key, value in part.items():
        if key not in ("type", "text") and value:
            raise unsupported(f"{name}.{key}")
    if not isinstance(part.get("text"), str):
        raise BadRowError(f"{name}.text must be a string, not {kind(part.get('text'))}")
    return whole_text(part["text"], f"{name}.text")


def _reasoning(entry: Mapping[str, object], name: str) -> str:
    found = {key: _optional_text(entry, key, name) for key in _REASONING_KEYS if entry.get(key)}
    if len(set(found.values())) > 1:
        raise BadRowError(f"{name} has {' and '.join(found)}, and they differ; keep one")
    return next(iter(found.values()), "")


def _optional_text(entry: Mapping[str, object], key: str, name: str) -> str:
    value = entry.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{name}.{key} must be a string, not {kind(value)}")
    return whole_text(value, f"{name}.{key}")


def _flag(entry: Mapping[str, object], name: str, flags: set[str]) -> bool | None:
    train, weight = entry.get("train"), entry.get("weight")
    if train is not None:
        if not isinstance(train, bool):
            raise BadRowError(f"{name}.train must be true or false, not {kind(train)}")
        flags.add("train")
    if weight is not None:
        if weight not in (0, 1):
            raise BadRowError(f"{name}.weight must be 0 or 1, not {weight}")
        flags.add("weight")
        return bool(weight) if train is None else train
    return train
