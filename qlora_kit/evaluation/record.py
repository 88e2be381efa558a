"""eval.json: what was asked, and the scores of every artifact that was asked the same; other scores are kept apart."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import file_hash, read_json, write_json
from qlora_kit.core.units import counted
from qlora_kit.evaluation.eval_plan import EvalPlan
from qlora_kit.evaluation.scored_on import scored_on

MOST_EARLIER = 8
# What a part of the questions fills in a row.
FIELDS = {
    "answers": ("exact_match", "exact_match_interval", "answered", "tokens_per_second", "stops", "stops_interval"),
    "text": ("text_perplexity", "text_perplexity_interval", "text_tokens"),
    "lm_eval": ("lm_eval",),
}

Record = Mapping[str, Any]


def asked(plan: EvalPlan) -> dict[str, Any]:
    """What every artifact is asked, with the settings that its scores depend on; None for a part that is left out."""
    config = plan.config
    prompts = sha256(repr(plan.prompts).encode()).hexdigest()
    text = config.text_file if plan.windows else None
    return {
        "scored_on": {**scored_on(plan.rows), "top_tokens": config.top_tokens},
        "answers": {
            "prompts": len(plan.prompts),
            "sha256": prompts,
            "task": plan.task.value,
            "max_new_tokens": config.max_new_tokens,
        }
        if plan.prompts
        else None,
        "text": {
            "sha256": file_hash(Path(text)),
            "window": config.text_window,
            "stride": config.text_stride,
            "windows": config.text_windows,
        }
        if text
        else None,
        "lm_eval": {"tasks": list(plan.harness.names), "limit": config.lm_eval_limit} if plan.harness.names else None,
    }


def write_record(path: Path, now: Record, current: Sequence[str]) -> None:
    """Write eval.json: scores join those that are there where they answer the same questions.

    Args:
        now: the new rows and samples, and under `asked` what they answer.
        current: names of the artifacts whose scores in eval.json still count, in the order of the table.
    """
    before = _before(path)
    if not before.get("rows"):
        write_json(path, now)
        return
    if _goes_with(before.get("asked"), now["asked"]):
        write_json(path, _joined(before, now, current))
        return
    names = ", ".join(str(row.get("name")) for row in before["rows"])
    log.info(
        f"{path}: the scores of {names} there are of other rows or settings ({_scope(before)}; now {_scope(now)}): "
        "they are kept in this file, as `earlier`; the page shows the new ones"
    )
    earlier = before.get("earlier")
    kept = [{key: value for key, value in before.items() if key != "earlier"}]
    write_json(path, {**now, "earlier": [*kept, *(earlier if isinstance(earlier, list) else [])][:MOST_EARLIER]})


def _scope(record: Record) -> str:
    """In words, on how many rows the scores of a record are."""
    part = record.get("asked")
    scored = part.get("scored_on") if isinstance(part, Mapping) else None
    rows = scored.get("rows") if isinstance(scored, Mapping) else None
    return counted(rows, "row") if isinstance(rows, int) else "rows that it does not name"


def _before(path: Path) -> dict[str, Any]:
    """What eval.json holds; nothing, with a line for the user, where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        before = dict(read_json(path))
    except RecipeError as error:
        log.info(f"{error.problems[0].what}, so it is written anew")
        return {}
    for part in ("rows", "samples"):
        found = before.get(part)
        before[part] = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return before


def _goes_with(before: object, now: Record) -> bool:
    """Whether two lists of questions differ in nothing but parts that one of them leaves out."""
    if not isinstance(before, Mapping) or before.get("scored_on") != now["scored_on"]:
        return False
    parts = [(before.get(part), now[part]) for part in FIELDS]
    return all(was is None or wanted is None or was == wanted for was, wanted in parts)


def _joined(before: Record, now: Record, current: Sequence[str]) -> dict[str, Any]:
    rows = {str(row.get("name")): row for row in before["rows"]}
    for row in now["rows"]:
        left_out = [name for part, names in FIELDS.items() if now["asked"][part] is None for name in names]
        was = {} if row.get("error") else rows.get(row["name"], {})
        rows[row["name"]] = {**row, **{name: was[name] for name in left_out if name in was}}
    names = {row["name"] for row in now["rows"]}
    order = [name for name in current if name in rows]
    asked_of_all = {part: now["asked"][part] or before["asked"].get(part) for part in now["asked"]}
    return {
        **before,
        **now,
        "rows": [rows[name] for name in order if name in names or _is_of_today(rows[name])],
        "samples": _samples(before["samples"], now["samples"]),
        "asked": asked_of_all,
    }


def _is_of_today(row: Record) -> bool:
    return isinstance(row.get("fidelity"), Mapping)


def _samples(before: Sequence[Record], now: Sequence[Record]) -> Sequence[Record]:
    """Answers to the same prompts side by side; the older ones where nothing was asked now."""
    if not now:
        return before
    by_prompt = {str(one.get("prompt")): one.get("answers") for one in before}

    def answers(one: Record) -> dict[str, Any]:
        was = by_prompt.get(str(one["prompt"]))
        return {**(was if isinstance(was, dict) else {}), **one["answers"]}

    return [{**one, "answers": answers(one)} for one in now]
