"""Templates escape all that they are given, refuse to go without a value, and bring what pages are made of."""

import pytest
from jinja2 import UndefinedError, nodes
from markupsafe import Markup

from qlora_kit.report.inspect_page import LengthChart
from qlora_kit.report.page import Table, render, templates

NAMES = templates().list_templates()
PAGES = [name for name in NAMES if name.endswith(".html.jinja")]


def parsed(name):
    loader, environment = templates().loader, templates()
    assert loader is not None
    return environment.parse(loader.get_source(environment, name)[0])


def test_every_file_of_the_folder_is_a_template_or_a_style():
    assert {"page.html.jinja", "parts.html.jinja", "inspect_page.html.jinja", "run_page.html.jinja"} <= set(PAGES)
    assert all(name in PAGES or name.endswith(".css") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_escapes_and_does_not_turn_it_off(name):
    template = parsed(name)
    assert templates().autoescape is True
    assert not list(template.find_all(nodes.EvalContextModifier))  # {% autoescape false %}
    assert "safe" not in {one.name for one in template.find_all(nodes.Filter)}


def test_what_a_template_is_given_is_escaped():
    nasty = "<b>\"'&\x00\x9b"
    shown = templates().from_string("{{ value }}").render(value=nasty)
    assert shown == "&lt;b&gt;&#34;&#39;&amp;\x00\x9b"


def test_what_a_template_gives_holds_no_control_characters():
    page = {"name": "a\x1b", "files": [], "rows": [], "audit": {"findings": [], "packing": None, "padding": None}}
    table = Table(("\x00",), [("\x9b",)])
    chart = LengthChart(Markup(""), [], "")
    html = render(
        "inspect_page.html.jinja",
        page=page,
        verdict="",
        numbers=[],
        lengths=chart,
        sources=table,
        tokens=table,
        bins="",
    )
    assert "a␛: rows" in html
    assert "<th>␀</th>" in html
    assert "<td>\ufffd</td>" in html


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(UndefinedError):
        templates().from_string("{{ absent }}").render()
