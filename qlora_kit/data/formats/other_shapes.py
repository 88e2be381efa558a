"""Rows of other makers' shapes -> the columns that are read here: bare lists of turns, and Gemini's contents."""

from collections.abc import Mapping

from qlora_kit.data.formats.bad_rows import BadRowError, kind, listed, unsupported

_GEMINI = "contents"
_GEMINI_SYSTEM = ("systemInstruction", "system_instruction")
_GEMINI_ROLES = {"user": "user", "model": "assistant"}


def is_list_of_turns(value: object) -> bool:
    """Whether a value is a list of objects that each have a speaker and a text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def known_shape(row: object) -> Mapping[str, object]:
    """A row under the columns that are read here; one that has them already comes back as it is.

    Raises:
        BadRowError: no object and no list of turns, or contents that cannot be read whole.
    """
    if isinstance(row, Mapping):
        is_gemini = _GEMINI in row and "messages" not in row and _has_parts(row[_GEMINI])
        return _of_gemini(row) if is_gemini else row
    if is_list_of_turns(row):
        return {"messages": row}
    raise BadRowError(f"a row must be a JSON object, not {kind(row)}")


def _has_parts(contents: object) -> bool:
    return isinstance(contents, list) and any(isinstance(entry, dict) and "parts" in entry for entry in contents)


def _of_gemini(row: Mapping[str, object]) -> Mapping[str, object]:
    rest = {name: value for name, value in row.items() if name not in (_GEMINI, *_GEMINI_SYSTEM)}
    turns = [{"role": "system", "content": _texts(row[name], name)} for name in _GEMINI_SYSTEM if row.get(name)]
    contents = row[_GEMINI]
    assert isinstance(contents, list)
    for index, entry in enumerate(contents):
        name = f"{_GEMINI}[{index}]"
        if not isinstance(entry, dict):
            raise BadRowError(f"{name} must be an object with role and parts, not {kind(entry)}")
        role = entry.get("role", "user")
        if not isinstance(role, str) or role not in _GEMINI_ROLES:
            raise BadRowError(f"{name} has the role {role!r}; known are {', '.join(_GEMINI_ROLES)}")
        turns.append({"role": _GEMINI_ROLES[role], "content": _texts(entry, name)})
    return {**rest, "messages": turns}


def _texts(entry: object, name: str) -> list[dict[str, str]] | str:
    """The texts of one entry's parts, as parts of the kind that messages have."""
    if isinstance(entry, str):
        return entry
    parts = entry.get("parts") if isinstance(entry, dict) else None
    if not isinstance(parts, list) or not parts:
        raise BadRowError(f"{name} has no list of parts")
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            held = listed(part) if isinstance(part, dict) else kind(part)
            raise BadRowError(f"{name}.parts[{index}] must be an object with text, not {held}; only text is supported")
        for key, value in part.items():
            if key != "text" and value:
                raise unsupported(f"{name}.parts[{index}].{key}")
        texts.append({"type": "text", "text": part["text"]})
    return texts
