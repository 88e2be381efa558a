"""Keys and values of earlier releases under their names of today: in lines, in recipe files and in older runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.folders import groups

SWEPT = "hydra.sweeper.params."
_TRUE, _FALSE = ("true", "yes", "y", "on", "1"), ("false", "no", "n", "off", "0")
_OPPOSITE = {**dict.fromkeys(_TRUE, "false"), **dict.fromkeys(_FALSE, "true")}
_OVERRIDE = re.compile(r"([+~]{0,2})([A-Za-z_][\w.]*)(?:(=)(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Renamed:
    """What a key of an earlier release is called today.

    Attributes:
        key: of today, in the same group.
        values: of an earlier release -> of today; any other value is written as it was.
        opposite: what to write for `true`, where the key means the opposite today; a truth value that is not in the
            table is refused then.
    """

    key: str
    values: Mapping[str, str] = field(default_factory=dict)
    opposite: str = ""


# A group stands here by itself where an option of it was renamed.
RENAMED = {
    "data.on_long_row": Renamed("data.overflow", {"cut_end": "truncate_end", "cut_prompt": "truncate_prompt"}),
    "engine.weight_copies": Renamed("engine.cached_weights"),
    "eval.stop_prompts": Renamed("eval.eos_rows"),
    "export.calibration_general": Renamed("export.general_text_share"),
    "export.merge_base": Renamed("export.merge_base", {"measure": "best"}),
    "model.takes_images": Renamed("model.part", dict.fromkeys((*_TRUE, *_FALSE), "language_model")),
    "optim.strict": Renamed(
        "optim.fallback",
        {**dict.fromkeys(_TRUE, "false"), **dict.fromkeys(_FALSE, "true")},
        opposite="optim.fallback=false",
    ),
    "trainer": Renamed("trainer", {"smoke": "smoke_test"}),
}


def earlier_keys(key: str) -> list[str]:
    """What a field was called before."""
    return [old for old, renamed in RENAMED.items() if renamed.key == key and old != key]


def key_of(override: str) -> str:
    """The key of an override."""
    return override.partition("=")[0].lstrip("+~")


def todays_override(typed: str) -> str:
    """An override as it is written today, those of a sweep included; any other word as it is."""
    match = _OVERRIDE.fullmatch(typed)
    if match is None:
        return typed
    sign, path, equals, value = match.groups()
    prefix = SWEPT if path.startswith(SWEPT) else ""
    key = path.removeprefix(SWEPT)
    if key not in RENAMED:
        return typed
    today = todays_value(key, value or "", f"command line: {typed}")
    return f"{sign}{prefix}{RENAMED[key].key}{equals or ''}{today}"


def todays_value(key: str, value: str, where: str) -> str:
    """A value, or several in Hydra's grammar, of a key of an earlier release as it is written today.

    Args:
        where: it was set.
    Raises:
        RecipeError: the key means the opposite today, and of this value nothing tells what that is.
    """
    if RENAMED[key].opposite and _is_beyond_words(key, value):
        today, opposite = RENAMED[key].key, RENAMED[key].opposite
        what = f"{key} is called {today} now and means the opposite, which of '{value}' cannot be told"
        raise RecipeError(what, where, opposite)
    values = {old: new for old, new in RENAMED[key].values.items() if old not in groups().get(key, [])}
    if not values:
        return value
    words = re.compile(rf"(?<![\w.-])(?:{'|'.join(values)})(?![\w.-])", re.IGNORECASE)
    return words.sub(lambda found: values[found[0].lower()], value)


def _is_beyond_words(key: str, value: str) -> bool:
    """Whether a value may be a truth value that the table lacks: a number, a reference, what Hydra makes of a call."""
    if (call := re.match(r"\s*(\w+)\(", value)) and call[1] != "choice":
        return True
    words = [word for word in re.split(r"[\s,()\[\]'\"]+", value.lower()) if word not in ("", "choice")]
    return any(word not in RENAMED[key].values and not word.isalpha() for word in words)


def describe_rename(old: str, new: str) -> str:
    """The line for the user of an override that was written as in an earlier release."""
    old, new = old.lstrip("+~"), new.lstrip("+~")
    key, today = key_of(old), key_of(new)
    return f"{old} is called {new} now" if key == today else f"{key} is called {today} now; {old} was read as {new}"


@cache
def tell_renamed(line: str) -> None:
    """Print a line once, however often a recipe is composed: a sweep composes one for each job."""
    log.info(line)


def with_todays_services(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain containers; `tracker.name: wandb` was one service of several."""
    tracker = recipe.get("tracker")
    if not isinstance(tracker, dict) or "name" not in tracker:
        return recipe
    others = {key: value for key, value in tracker.items() if key != "name"}
    chosen = {} if tracker["name"] in (None, "jsonl") else {str(tracker["name"]): True}
    return {**recipe, "tracker": others | chosen}
