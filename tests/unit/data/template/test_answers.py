"""What a row says is what is trained, or the row is refused by name."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.spans import rendered
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES

ASK = Message("user", "2+2?")
THOUGHT = "<think>\nadding\n</think>\n\nFour."


def trained_text(family, *answers, train_on=TrainOn.assistant):
    template = family if isinstance(family, ChatTemplate) else FAMILIES[family].template
    turns = [turn for answer in answers for turn in (ASK, answer)]
    row = rendered(Conversation(tuple(turns), "a.jsonl", 3), template, train_on)
    return [row.text[span.start : span.end] for span in row.spans]


def said(content, **more):
    return Message("assistant", content, **more)


MANGLED = {
    "text before a thought": ("Sure, let me see. <think>adding</think> Four.", "(turn 2): 'Sure, let me see.'"),
    "two thoughts": ("<think>one</think>Maybe five. <think>two</think>Four.", "(turn 2): 'Maybe five.'"),
    "text between two thoughts": ("Hm.<think>one</think><think>two</think>Four.", "(turn 2): 'Hm.'"),
    "a thought without an end": ("<think>\nadding and adding", "begins a thought that it never ends"),
}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("train_on", [TrainOn.assistant, TrainOn.last, TrainOn.everything])
@pytest.mark.parametrize(("content", "reason"), MANGLED.values(), ids=MANGLED)
def test_an_answer_that_the_template_mangles_is_refused(family, train_on, content, reason):
    if train_on is TrainOn.everything and "never ends" in reason:
        pytest.skip("the empty thought before it is the template's for every answer")
    with pytest.raises(RecipeError) as caught:
        trained_text(family, said(content), train_on=train_on)
    assert reason in str(caught.value)
    assert "a.jsonl:3" in str(caught.value)


@pytest.mark.parametrize("how", ["replace('Fo', '')", "[1:]", "split('o')[0]", "replace('ur', 'UR')", "lower()"])
def test_a_template_that_changes_answers_is_found_whatever_it_does(how):
    content = f"(message['content'].{how} if message['role'] == 'assistant' else message['content'])"
    source = FAMILIES["chatml"].template.source.replace("message['content']", content.replace(".[", "["))
    with pytest.raises(RecipeError):
        trained_text(ChatTemplate(source, {}), said("Four, of course"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ["Four.", " Four.\n\nOr 4. ", "The <think> tag opens a thought.", "a < b </b>"])
def test_ordinary_answers_are_no_finding(family, content):
    assert "".join(content.split()) in "".join("".join(trained_text(family, said("Hm."), said(content))).split())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "two_modes", "chatml", "llama3", "deepseek_r1"])
def test_well_formed_thoughts_are_no_finding(family):
    assert trained_text(family, said(THOUGHT))[0].endswith("Four.")
    assert trained_text(family, said(THOUGHT), said(THOUGHT))[1].endswith("Four.")
    if family != "two_modes":
        assert trained_text(family, said("adding</think>Four."))[0].endswith("Four.")
    assert trained_text(family, said("Four.", reasoning="adding"))[0].endswith("Four.")


def test_text_beside_calls_is_no_finding():
    call = ToolCall("add", '{"a": 2}')
    turns = (ASK, said("Let me see.", tool_calls=(call,)), Message("tool", "4"), said("Four."))
    row = rendered(Conversation(turns, "a.jsonl", 3), FAMILIES["qwen3"].template, TrainOn.assistant)
    assert "Let me see." in row.text
