"""Which turns are trained, where they stand in the text, and which templates are refused."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.spans import Span, rendered, trained_turns
from qlora_kit.data.template.turns import found_by_rendering
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES

CHATML = FAMILIES["chatml"].template
CALL = ToolCall("add", '{"a": 1}', "call00001")


def chat(*turns, system=None, **more):
    """User and assistant in turn; a turn may be a message of its own."""
    messages = [Message("system", system)] if system else []
    for index, turn in enumerate(turns):
        messages.append(turn if isinstance(turn, Message) else Message(("user", "assistant")[index % 2], turn))
    return Conversation(tuple(messages), "rows.jsonl", 7, **more)


def trained_texts(conversation, template=CHATML, train_on=TrainOn.assistant):
    row = rendered(conversation, template, train_on)
    return [row.text[span.start : span.end] for span in row.spans]


def refusal(conversation, template):
    with pytest.raises(RecipeError) as caught:
        rendered(conversation, template, TrainOn.assistant)
    assert "rows.jsonl:7" in str(caught.value)
    assert "model.chat_template=" in str(caught.value)
    return str(caught.value)


# ChatML with a branch for answers
BRANCHED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def written(old, new):
    """ChatML with a part of it written otherwise."""
    assert old in BRANCHED
    return ChatTemplate(BRANCHED.replace(old, new), {})


def test_a_row_counts_characters_of_its_own_text():
    row = rendered(chat("hi", "hello", "and", "bye", system="be brief"), CHATML, TrainOn.assistant)
    front = "<|im_start|>system\nbe brief<|im_end|>\n"
    first = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert row.text.startswith(f"{front}{first}hello<|im_end|>\n<|im_start|>user\nand<|im_end|>\n")
    start = len(front) + len(first)
    assert row.spans[0] == Span(start, start + 5)
    assert row.head_end == len(front)
    assert row.turn_starts == (start + 5 + len("<|im_end|>\n"),)
    assert (row.dropped_reasoning, row.dropped_text) == (0, 0)


def test_the_first_user_turn_is_no_place_to_split_even_after_a_greeting():
    row = rendered(chat(Message("assistant", "welcome"), Message("user", "hi"), "x", "yes"), CHATML, TrainOn.assistant)
    assert row.turn_starts == ()
    assert row.head_end == 0
    assert [row.text[span.start : span.end] for span in row.spans] == ["welcome", "yes"]


def test_a_user_turn_after_a_user_turn_is_no_place_to_split():
    conversation = chat("a", "b", Message("user", "c"), Message("user", "d"), Message("assistant", "e"))
    row = rendered(conversation, CHATML, TrainOn.assistant)
    assert [row.text[start:][17:18] for start in row.turn_starts] == ["c"]


def test_a_user_turn_after_a_tools_result_is_a_place_to_split():
    conversation = chat("a", "b", Message("tool", "3"), Message("user", "c"), Message("assistant", "d"))
    row = rendered(conversation, FAMILIES["llama3"].template, TrainOn.assistant)
    assert [row.text[start:].partition("<|eot_id|>")[0] for start in row.turn_starts] == [
        "<|start_header_id|>user<|end_header_id|>\n\nc"
    ]


def test_a_template_without_closing_tokens_is_split_at_its_headers():
    template = ChatTemplate(
        "{{ '<s>' }}{% for m in messages %}{{ m.role | title + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
        {},
    )
    row = rendered(chat("a", "b", "c", "d"), template, TrainOn.assistant)
    assert row.text[: row.head_end] == "<s>"
    assert [row.text[start:] for start in row.turn_starts] == ["User: c\n\nAssistant: d\n\n"]
    assert [row.text[span.start : span.end] for span in row.spans] == ["b", "d"]


def test_a_template_that_ends_the_whole_text_otherwise_is_split_after_the_closing_word():
    template = ChatTemplate(
        "{{ '<s>' }}{% for m in messages %}{{ m.role + ': ' + m.content + '[END]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ '</s>' }}{% endif %}",
        {},
    )
    row = rendered(chat("a", "b", "c", "d"), template, TrainOn.assistant)
    assert row.text[: row.head_end] == "<s>"
    assert [row.text[start:] for start in row.turn_starts] == ["user: c[END]\nassistant: d[END]\n</s>"]


def test_a_past_thought_may_be_cut_off_with_the_blanks_after_it():
    template = written(
        "assistant\n' + message['content']",
        "assistant\n' + (message['content'] if message == (messages | selectattr('role', 'equalto', "
        "'assistant') | list)[-1] else message['content'].split('</think>')[-1] | trim)",
    )
    answer = "<think>\nhm\n</think>\n\nx"
    last = f"{answer}, at last"
    assert trained_texts(chat("a", answer, "b", answer, "c", last), template) == ["x", "x", last]


CHOSEN = chat(
    "a",
    Message("assistant", "b", is_chosen=True),
    "c",
    Message("assistant", "d", is_chosen=False),
    "e",
    Message("assistant", "f"),
    trained_from=2,
)


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [("assistant", ["d", "f"]), ("completion", ["d", "f"]), ("last", ["f"]), ("chosen", ["b"])],
)
def test_which_turns_are_trained(train_on, wanted):
    assert trained_texts(CHOSEN, train_on=TrainOn(train_on)) == wanted


def test_everything_is_one_span():
    row = rendered(CHOSEN, CHATML, TrainOn.everything)
    assert row.spans == (Span(0, len(row.text)),)
    assert len(row.turn_starts) == 2
    assert trained_turns(CHOSEN, TrainOn.everything) == ()


def test_an_answer_that_holds_the_closing_token_is_trained_to_its_end():
    assert trained_texts(chat("a", "x<|im_end|>y", "b", "<|im_start|>user\n")) == ["x<|im_end|>y", "<|im_start|>user\n"]


def test_a_template_that_trims_answers_is_followed():
    template = written("message['content']", "message['content'] | trim")
    assert trained_texts(chat("a", "  x  ", "b", "\ny"), template) == ["x", "y"]


@pytest.mark.parametrize("prompt", ["<think>\n", "<think>\n\n</think>\n\n", "<thinking>\n"])
def test_an_opener_that_the_text_leaves_out_is_not_waited_for(prompt):
    template = written("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n" + prompt + "' }}")
    assert trained_texts(chat("a", "x", "b", "y"), template) == ["x", "y"]
    assert trained_texts(chat("a", f"{prompt}hm"), template) == ["hm"]  # here the text agrees: the opener is prompt


def test_any_other_prompt_that_is_not_in_the_text_is_refused():
    template = written("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\nSure! ' }}")
    message = refusal(chat("hi", "hello"), template)
    assert "renders earlier turns differently once an answer follows" in message
    assert "'Sure! ' became 'hello<|im_end|>\\n'" in message
    assert "data.train_on=last" in message


def test_a_template_without_a_generation_prompt_leaves_its_header_to_the_model():
    template = written("{% if add_generation_prompt %}", "{% if false %}")
    assert trained_texts(chat("a", "x"), template) == ["<|im_start|>assistant\nx"]


def test_a_template_that_hides_an_answer_is_refused():
    template = written("assistant\n' + message['content'] +", "assistant\n' + message['content'] | upper +")
    assert "the chat template leaves an assistant turn out of the text" in refusal(chat("hi", "hello"), template)


def test_a_template_that_changes_an_answer_by_what_it_says_is_refused():
    template = written(
        "assistant\n' + message['content'] +", "assistant\n' + message['content'] + message['content'][:1] * 2 +"
    )
    message = refusal(chat("hi", "hello"), template)
    assert (
        "the chat template changes an answer, or what follows it, so its end cannot be told in the text: 'hello"
        in message
    )


def test_a_template_that_cuts_the_prompt_where_an_answer_is_empty_is_refused():
    template = written(
        "{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}",
        "{{ ('<|im_start|>assistant\n' + message['content']) | trim + '\n' }}",
    )
    assert trained_texts(chat("a", "x"), template) == ["x"]
    assert "its end cannot be told in the text" in refusal(chat("a", ""), template)


def test_calls_with_something_of_theirs_after_their_end_are_refused():
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}<|end|>"
        "{{ c.function.arguments | length }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        {},
    )
    calls = (ToolCall("add", '{"a": 1, "b": 2}'),)
    assert "its end cannot be told" in refusal(chat("a", Message("assistant", "", tool_calls=calls)), template)


def test_a_template_that_shows_no_place_for_an_answer_is_refused():
    template = written(
        "{% for message",
        "{% if messages[-1].role != 'assistant' or 'Qzx' in messages[1].content %}"
        "{{ raise_exception('no') }}{% endif %}"
        "{% for message",
    )
    assert "renders earlier turns differently once an answer follows" in refusal(chat("a", "b"), template)


def test_a_template_that_refuses_a_row_is_quoted():
    template = written("{% for message", "{{ raise_exception('no, thanks') }}{% for message")
    assert "the chat template refuses this row: no, thanks" in refusal(chat("hi", "hello"), template)


@pytest.mark.parametrize(
    ("conversation", "lost"),
    [
        (chat("hi", Message("assistant", "", tool_calls=(CALL,))), "the tool calls of an assistant turn"),
        (chat("hi", "hello", tools=({"type": "function", "function": {"name": "add"}},)), "the row's tools"),
        (chat("hi", "hello", Message("tool", "3"), Message("assistant", "x")), "a tool turn"),
    ],
    ids=["calls", "tools", "result"],
)
def test_what_a_template_leaves_out_is_named(conversation, lost):
    template = FAMILIES["phi3"].template
    assert f"the chat template leaves {lost} out of the text" in refusal(conversation, template)


def test_thoughts_that_are_left_out_are_counted():
    thinking = Message("assistant", "x", reasoning="hm")
    inside = Message("assistant", "<think>hm</think>y")
    row = rendered(chat("a", thinking, "b", inside, "c", thinking), FAMILIES["qwen3"].template, TrainOn.assistant)
    assert [row.text[span.start : span.end] for span in row.spans] == ["x", "y", "<think>\nhm\n</think>\n\nx"]
    assert row.dropped_reasoning == 2


def test_two_calls_are_one_span():
    turn = Message("assistant", "Wait.", tool_calls=(CALL, ToolCall("stop", "{}", "call00002")))
    results = [Message("tool", text, tool_call_id=call) for text, call in (("1", "call00001"), ("2", "call00002"))]
    conversation = chat("a", turn, *results, Message("assistant", "y"))
    assert trained_texts(conversation, FAMILIES["qwen2_5"].template) == [
        'Wait.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>',
        "y",
    ]


def test_calls_that_close_with_another_token_end_before_it():
    turn = Message("assistant", "", tool_calls=(CALL,))
    template = FAMILIES["llama3_1"].template
    conversation = chat("a", turn, Message("tool", "3"), "y", template_settings={"builtin_tools": ["add_"]})
    row = rendered(conversation, template, TrainOn.assistant)
    span = row.spans[0]
    assert row.text[span.start : span.end] == '{"name": "add", "parameters": {"a": 1}}'
    assert row.text[span.end :].startswith("<|eom_id|><|start_header_id|>ipython")


def test_calls_of_a_template_that_closes_nothing_are_whole():
    template = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        {},
    )
    conversation = chat("a", Message("assistant", "", tool_calls=(CALL,)), Message("tool", "3"), "y", "b", "z")
    row = rendered(conversation, template, TrainOn.assistant)
    assert [row.text[span.start : span.end] for span in row.spans] == ['<call>add{"a": 1}</call>', "y", "z"]
    assert [row.text[start:] for start in row.turn_starts] == ["<|user|>b<|assistant|>z"]


def test_a_row_that_holds_the_marks_is_rendered_all_the_same():
    answer = "Qzxanswerstandshereqzx Qzxtextofaxzq Qzxwordsbxzq"
    conversation = chat(answer, answer)
    assert trained_texts(conversation) == [answer]
    assert found_by_rendering(conversation, CHATML, (1,)) == rendered(conversation, CHATML, TrainOn.assistant)


def test_a_thought_in_the_content_of_a_turn_that_is_over_keeps_the_blanks_that_the_template_keeps():
    """Qwen 3.5 trims a content before it takes the thought out, so what is left may begin with a blank."""
    row = chat(
        "a",
        "<think>\none\n</think>\n\n one",
        "b",
        Message("assistant", "", reasoning="two", tool_calls=(CALL,)),
        Message("tool", "c", name="add", tool_call_id=CALL.id),
        Message("assistant", "three"),
        Message("user", "d"),
        Message("assistant", "four"),
    )
    texts = trained_texts(row, FAMILIES["qwen3_5"].template)
    assert texts[0] == " one"
    assert texts[1].startswith("<tool_call>")
    assert texts[2:] == ["three", "\n</think>\n\nfour"]
