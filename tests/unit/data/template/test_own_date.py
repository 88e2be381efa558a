"""A template's own date stays what training saw."""

from qlora_kit.data.conversation import Message
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.own_date import with_own_date
from tests.chat_templates import FAMILIES

USER = (Message("user", "Hi"),)


def test_a_date_from_outside_no_longer_counts() -> None:
    source = FAMILIES["llama3_1"].template
    kept = ChatTemplate(with_own_date(source.source), source.special)
    outside = {"date_string": "01 Jan 2030"}
    assert "01 Jan 2030" in source.render(USER, settings=outside)
    assert kept.render(USER, settings=outside) == kept.render(USER) == source.render(USER)


def test_other_templates_stay_as_they_are() -> None:
    for name in ("llama3", "llama3_2", "qwen3", "gemma3", "dated"):
        assert with_own_date(FAMILIES[name].template.source) == FAMILIES[name].template.source
    two = (
        "{% if date_string is not defined %}{% set date_string = 'a' %}{% else %}{% set date_string = 'b' %}{% endif %}"
    )
    assert with_own_date(two) == two
