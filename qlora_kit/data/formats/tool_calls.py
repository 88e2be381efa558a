"""Calls that an assistant makes, and the functions that it may call, as typed values."""

import json
from collections.abc import Mapping

from qlora_kit.data.conversation import Message, ToolCall
from qlora_kit.data.formats.bad_rows import BadRowError, json_reason, json_text, kind, listed, unsupported, whole_text

# `index` counts the calls of a streamed answer; it says nothing to a template.
_CALL_KEYS = frozenset({"id", "type", "function", "index", "name", "arguments"})


def tool_calls(value: object, name: str) -> tuple[ToolCall, ...]:
    """Calls in OpenAI's form or flat as `{name, arguments}`; nothing at all is no calls.

    Raises:
        BadRowError: a call without a name, or whose arguments are no JSON object.
    """
    if not value:
        return ()
    if not isinstance(value, list):
        raise BadRowError(f"{name} must be a list, not {kind(value)}")
    return tuple(_call(entry, f"{name}[{index}]") for index, entry in enumerate(value))


def calls_from_text(text: str, name: str) -> tuple[ToolCall, ...]:
    """Calls that a `function_call` turn spells as JSON: one object, or a list of them."""
    value = _parsed(text, f"{name} of a function call")
    calls = tool_calls(value if isinstance(value, list) else [value], name)
    if not calls:
        raise BadRowError(f"{name} names no call")
    return calls


def tools(value: object, name: str) -> tuple[Mapping[str, object], ...]:
    """Functions that the assistant may call, each wrapped as `{type: function, function: ...}`.

    Args:
        value: a list, or JSON text of one, of schemas that are wrapped already or not.

    Raises:
        BadRowError: not such a list, or a function without a name.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, name)
    if not value or isinstance(value, str):
        return ()
    if not isinstance(value, list):
        raise BadRowError(f"{name} must be a list of functions, or JSON text of one, not {kind(value)}")
    json_text(value, name)
    return tuple(_tool(entry, f"{name}[{index}]") for index, entry in enumerate(value))


def check_answered_calls(messages: tuple[Message, ...]) -> None:
    """Refuse a tool turn that answers a call which no turn before it made.

    Raises:
        BadRowError: naming the call.
    """
    made: set[str] = set()
    for index, message in enumerate(messages):
        made.update(call.id for call in message.tool_calls)
        if message.tool_call_id and message.tool_call_id not in made:
            raise BadRowError(f"turn {index + 1} answers the tool call '{message.tool_call_id}', which nobody made")


def _call(entry: object, name: str) -> ToolCall:
    if not isinstance(entry, dict):
        raise BadRowError(f"{name} must be an object with name and arguments, not {kind(entry)}")
    for key, value in entry.items():
        if key not in _CALL_KEYS and value:
            raise unsupported(f"{name}.{key}")
    if entry.get("type") not in (None, "function"):
        raise BadRowError(f"{name}.type is '{entry['type']}'; only function calls are supported")
    function = entry.get("function") or entry
    if not isinstance(function, dict):
        raise BadRowError(f"{name}.function must be an object with name and arguments, not {kind(function)}")
    if function is not entry:
        for key, value in function.items():
            if key not in ("name", "arguments") and value:
                raise unsupported(f"{name}.function.{key}")
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise BadRowError(f"{name} has no name; it has {listed(function)}")
    call_id = entry.get("id") or ""
    if not isinstance(call_id, str):
        raise BadRowError(f"{name}.id must be a string, not {kind(call_id)}")
    arguments = _arguments(function.get("arguments"), f"{name}.arguments")
    return ToolCall(whole_text(called, f"{name}.name"), arguments, whole_text(call_id, f"{name}.id"))


def _arguments(value: object, name: str) -> str:
    if value is None:
        return "{}"
    if isinstance(value, str):
        value = _parsed(value, name)
    if not isinstance(value, dict):
        raise BadRowError(f"{name} must be a JSON object, not {kind(value)}")
    return json_text(value, name)


def _tool(entry: object, name: str) -> Mapping[str, object]:
    if not isinstance(entry, dict):
        raise BadRowError(f"{name} must be an object, not {kind(entry)}")
    if entry.get("type") not in (None, "function", "object"):
        raise BadRowError(f"{name}.type is '{entry['type']}'; only functions are supported")
    function = entry.get("function")
    wrapped = isinstance(function, dict)
    schema = function if isinstance(function, dict) else {key: value for key, value in entry.items() if key != "type"}
    if not isinstance(schema.get("name"), str) or not schema["name"]:
        raise BadRowError(f"{name} has no name; it has {listed(schema)}")
    return entry if wrapped and "type" in entry else {"type": "function", "function": schema}


def _parsed(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRowError(f"{name} is not JSON: {json_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{name} is not JSON: nested too deep or a number too long") from error
