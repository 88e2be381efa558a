"""Whatever is said, no character of a prompt is in a span, none of an answer is outside, and the short way is exact."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.data.template.answers import check_answers
from qlora_kit.data.template.spans import rendered, trained_turns
from qlora_kit.data.template.turns import found_by_rendering
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES

pytestmark = pytest.mark.slow

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Ищет",
        "parameters": {"type": "object", "properties": {"что": {"type": "string"}}, "required": ["что"]},
    },
}


def words(letters):
    return st.text(letters + " \n.,<>|[]{}\"'", min_size=1, max_size=12).filter(
        lambda text: any(letter.isalpha() for letter in text)
    )


CYRILLIC, GREEK = words("абвгдежз"), words("αβγδεζηθ")


def is_cyrillic(text):
    return any("Ѐ" <= letter <= "ӿ" for letter in text)


def is_greek(text):
    return any("Ͱ" <= letter <= "Ͽ" for letter in text)


@st.composite
def tool_rounds(draw):
    """A call, its result and the final answer."""
    thoughts = [draw(st.one_of(st.just(""), GREEK)) for _ in range(2)]
    call = ToolCall("look_up", json.dumps({"τι": draw(st.text("αβγδ ", max_size=5))}, ensure_ascii=False), "call00001")
    return [
        Message("assistant", "", reasoning=thoughts[0], tool_calls=(call,)),
        Message("tool", draw(CYRILLIC), name="look_up", tool_call_id="call00001"),
        Message("assistant", draw(GREEK), reasoning=thoughts[1]),
    ]


@st.composite
def two_alphabets(draw, family):
    """The prompt's texts in Cyrillic, the assistant's in Greek, in any order that the family's template takes."""
    messages = [Message("system", draw(CYRILLIC))] if family.system and draw(st.booleans()) else []
    with_tools = family.tools and draw(st.booleans())
    for _ in range(1 if with_tools and family.tools_once else draw(st.integers(1, 3))):
        messages.append(Message("user", draw(CYRILLIC)))
        if with_tools and draw(st.booleans()):
            messages += draw(tool_rounds())
        else:
            thought, inside = draw(st.one_of(st.just(""), GREEK)), draw(st.booleans())
            if inside and thought:
                messages.append(Message("assistant", f"<think>\n{thought}\n</think>\n\n{draw(GREEK)}"))
            else:
                messages.append(Message("assistant", draw(GREEK), reasoning=thought))
    return Conversation(tuple(messages), "rows.jsonl", 1, tools=(TOOL,) if with_tools else ())


@pytest.mark.parametrize("family", FAMILIES)
@QUICK
@given(data=st.data())
def test_spans_hold_what_the_assistant_says_and_nothing_else(family, data):
    conversation = data.draw(two_alphabets(FAMILIES[family]))
    row = rendered(conversation, FAMILIES[family].template, TrainOn.assistant)
    answers = [message for message in conversation.messages if message.role == "assistant"]
    assert len(row.spans) == len(answers)
    place = row.head_end
    for span, answer in zip(row.spans, answers, strict=True):
        assert place <= span.start <= span.end
        outside, inside = row.text[place : span.start], row.text[span.start : span.end]
        assert not is_greek(outside), outside
        assert not is_cyrillic(inside), inside
        assert answer.content.rpartition("</think>")[2].strip() in inside
        place = span.end
    assert not is_greek(row.text[: row.head_end] + row.text[place:])
    for start in row.turn_starts:
        assert all(start <= span.start or span.end <= start for span in row.spans)


PIECES = st.sampled_from(
    [
        *("<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>\n", "</s>", "[/INST]", "<|end|>\n"),
        *("<|im_start|>user\n", "<start_of_turn>user\n", "[INST] ", "<｜end▁of▁sentence｜>", "<|end|>"),  # noqa: RUF001
        *("</think>", "<think>\n", "<think>\n\n</think>\n\n", "/no_think", "<tool_response>", "</tool_response>"),
        *("Qzxanswerstandshereqzx", "Qzxtextofaxzq", "Qzxtextofbxzq", "Qzuserazq", "Qzxwordsaxzq", "\n\n", "  ", "\t"),
    ]
)
ANY_TEXT = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=4).map("".join)


@st.composite
def plain_conversations(draw):
    messages = [Message("system", draw(ANY_TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            Message("user", draw(ANY_TEXT)),
            Message("assistant", draw(ANY_TEXT), is_chosen=draw(st.booleans())),
        ]
    thinks = draw(st.sampled_from([None, None, {"enable_thinking": False}, {"enable_thinking": True}]))
    trained_from = draw(st.integers(0, 2))
    return Conversation(tuple(messages), "rows.jsonl", 1, trained_from=trained_from, template_settings=thinks)


def outcome(find):
    try:
        return find()
    except RecipeError as error:
        return str(error)


SHORT_WAYS = [TrainOn.assistant, TrainOn.last, TrainOn.chosen]


@pytest.mark.parametrize("family", FAMILIES)
@settings(QUICK, max_examples=120)
@given(conversation=plain_conversations(), train_on=st.sampled_from(SHORT_WAYS))
def test_the_short_way_finds_what_the_general_method_finds(family, conversation, train_on):
    template = FAMILIES[family].template
    trained = trained_turns(conversation, train_on)
    short = outcome(lambda: rendered(conversation, template, train_on))

    def by_the_general_method():
        row = found_by_rendering(conversation, template, trained)
        check_answers(conversation, row, trained)
        return row

    general = outcome(by_the_general_method)
    assert short == general
