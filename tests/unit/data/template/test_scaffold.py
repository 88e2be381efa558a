"""A plain row costs one rendering, and anything else is left to the general method."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.scaffold import found_by_scaffold
from qlora_kit.data.template.spans import rendered
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES

USER, ANSWER = Message("user", " Where is Oslo?\n"), Message("assistant", " In Norway. ")
TEMPLATE = FAMILIES["chatml"].template


class Counting(ChatTemplate):
    renderings = 0

    def render(self, *args, **kwargs):
        self.renderings += 1
        return super().render(*args, **kwargs)


def row_of(*messages, **more):
    return Conversation(messages, "rows.jsonl", 7, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_row_is_found_by_its_scaffold(family):
    row = found_by_scaffold(row_of(USER, ANSWER, USER, ANSWER), FAMILIES[family].template, (1, 3))
    assert row is not None
    assert [row.text[span.start : span.end].strip().endswith("In Norway.") for span in row.spans] == [True, True]


@pytest.mark.parametrize("family", ["llama3", "default_system", "qwen3"])
def test_it_costs_one_rendering(family):
    template = Counting(FAMILIES[family].template.source, FAMILIES[family].template.special)
    rendered(row_of(USER, ANSWER), template, TrainOn.assistant)
    before = template.renderings
    for number in range(5):
        rendered(
            row_of(Message("user", "?" * number), Message("assistant", f"It is {number}.")), template, TrainOn.assistant
        )
    assert template.renderings == before + 5


@pytest.mark.parametrize(
    "conversation",
    [
        row_of(USER, ANSWER, tools=({"type": "function"},)),
        row_of(USER, Message("assistant", "x", reasoning="hm")),
        row_of(USER, Message("assistant", "<think>hm</think>x")),
        row_of(USER, Message("assistant", "", tool_calls=(ToolCall("add", "{}"),))),
        row_of(USER, Message("tool", "3"), ANSWER),
        row_of(Message("user", "hi", name="Ann"), ANSWER),
        row_of(USER, ANSWER, template_settings={"documents": ["x"]}),
    ],
    ids=["tools", "thought", "inside", "calls", "result", "name", "settings"],
)
def test_what_is_left_to_the_general_method(conversation):
    assert found_by_scaffold(conversation, TEMPLATE, (1,)) is None


def test_a_text_that_is_not_the_predicted_one_is_left_to_the_general_method():
    template = FAMILIES["two_modes"].template
    system = Message("system", "Be brief. /no_think")
    assert found_by_scaffold(row_of(Message("system", "Be brief."), USER, ANSWER), template, (2,)) is not None
    assert found_by_scaffold(row_of(system, USER, ANSWER), template, (2,)) is None
    row = rendered(row_of(system, USER, ANSWER), template, TrainOn.assistant)
    # What the prompt already says, an empty thought, is not the model's to write.
    assert [row.text[span.start : span.end] for span in row.spans] == [" In Norway. "]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("", "  x  "), (" | trim", "x"), (".lstrip()", "x  "), (".rstrip()", "  x"), (".strip('\n')", "  x  ")],
)
def test_texts_are_trimmed_as_the_template_trims_them(how, wanted):
    template = ChatTemplate(TEMPLATE.source.replace("message['content']", f"message['content']{how}"), {})
    row = found_by_scaffold(row_of(USER, Message("assistant", "  x  "), USER, ANSWER), template, (1,))
    assert (row is None) == ("\n" in how)  # what a blank does not show, the text does
    row = rendered(row_of(Message("user", "a"), Message("assistant", "  x  ")), template, TrainOn.assistant)
    assert [row.text[span.start : span.end] for span in row.spans] == [wanted]


def test_a_scaffold_depends_on_the_settings():
    template = FAMILIES["qwen3_5"].template
    for thinks, wanted in (
        (True, "\n</think>\n\n In Norway."),
        (False, "In Norway."),
        (True, "\n</think>\n\n In Norway."),
    ):
        row = found_by_scaffold(row_of(USER, ANSWER, template_settings={"enable_thinking": thinks}), template, (1,))
        assert row is not None
        assert row.text[row.spans[0].start :].startswith(wanted.replace("\n\n ", "\n\n"))


def test_a_refusal_names_the_row():
    picky = ChatTemplate(
        "{% if 'bad' in messages[0].content %}{{ raise_exception('bad words') }}{% endif %}" + TEMPLATE.source, {}
    )
    assert found_by_scaffold(row_of(USER, ANSWER), picky, (1,)) is not None
    with pytest.raises(RecipeError, match="the chat template refuses this row: bad words") as caught:
        found_by_scaffold(row_of(Message("user", "bad"), ANSWER), picky, (1,))
    assert "rows.jsonl:7" in str(caught.value)


def test_a_prompt_that_ends_as_a_mark_begins_is_no_part_of_an_answer():
    header = r"{{ '<|im_start|>assistant\n' }}"
    assert header in TEMPLATE.source
    template = ChatTemplate(TEMPLATE.source.replace(header, header.replace(r"\n", r"\nQ")), {})
    with pytest.raises(RecipeError, match="renders earlier turns differently"):
        rendered(row_of(USER, Message("assistant", "Hello")), template, TrainOn.assistant)
    row = rendered(row_of(USER, Message("assistant", "Quite.")), template, TrainOn.assistant)
    assert [row.text[span.start : span.end] for span in row.spans] == ["uite."]
