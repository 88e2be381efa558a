"""A chat template that keeps its own date where a server would give it another.

A widespread template writes a fixed date unless it is given `date_string`. transformers gives none, so training saw the
fixed one; llama.cpp gives today's to every template.
"""

import re

_ASKS = re.compile(r"if\s+(?:not\s+date_string\s+is\s+defined|date_string\s+is\s+not\s+defined)")
_SETS = re.compile(r"""set\s+date_string\s*=\s*(?P<quote>["'])(?P<date>[^"'{}\\]*)(?P=quote)""")


def with_own_date(template: str) -> str:
    """The template with its fixed date set first, so that none from outside counts; unchanged where it has none."""
    dates = {match.group("date") for match in _SETS.finditer(template)}
    if not _ASKS.search(template) or len(dates) != 1 or "strftime_now" in template:
        return template
    return f'{{%- set date_string = "{dates.pop()}" -%}}\n{template}'
