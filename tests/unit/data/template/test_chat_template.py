"""Chat templates render exactly as transformers renders them, in a process that loads neither it nor torch."""

import json
import pickle
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_kit.data.conversation import Message, ToolCall
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal
from tests.chat_templates import FAMILIES, trl_templates

CALL = ToolCall("get_weather", '{"city": "Köln", "days": [1, 2]}', "call00001")
OTHER = ToolCall("stop", "{}", "call00002")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a <city>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SYSTEM, USER, ANSWER = (
    Message("system", " Be brief.\n"),
    Message("user", "Hi <b>there</b>"),
    Message("assistant", " Yes\n"),
)
THOUGHT = Message("assistant", "Yes", reasoning="Hm.\n")
THOUGHT_INSIDE = Message("assistant", "<think>\nHm.\n</think>\n\nYes")
RESULT = Message("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="call00001")
CONVERSATIONS = [
    (USER,),
    (USER, ANSWER),
    (SYSTEM, USER, ANSWER),
    (USER, ANSWER, USER, ANSWER),
    (USER, THOUGHT, USER, THOUGHT),
    (USER, THOUGHT_INSIDE, USER, THOUGHT_INSIDE),
    (USER, Message("assistant", "", tool_calls=(CALL,)), RESULT, ANSWER),
    (SYSTEM, USER, Message("assistant", "See.", reasoning="Hm.", tool_calls=(CALL,)), RESULT, THOUGHT, USER, ANSWER),
    (USER, Message("assistant", "", tool_calls=(CALL, OTHER)), RESULT, RESULT, ANSWER),
    (ANSWER, USER, ANSWER),
    (USER, USER),
    (Message("developer", "Be kind."), USER, ANSWER),
]


def peer(template: ChatTemplate) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **template.special)
    tokenizer.chat_template = template.source
    return tokenizer


def sources():
    for name, family in FAMILIES.items():
        yield pytest.param(family.template, id=name)
    indented = "  {% for m in messages %}\n    {% if m.content %}\n{{ m.content }}\n  {% endif %}\n {% endfor %}"
    yield pytest.param(ChatTemplate(indented, {}), id="indented")
    # These carry the `generation` tag.
    for name in ("qwen3_training", "llama3_training", "gptoss_training", "cohere2_training"):
        text = (trl_templates() / f"{name}.jinja").read_text("utf-8")
        assert "generation %}" in text
        yield pytest.param(ChatTemplate(text, {"bos_token": "<s>", "eos_token": "</s>"}), id=name)


@pytest.mark.parametrize("template", sources())
def test_every_template_renders_as_transformers_renders_it(template, monkeypatch):
    # From 5.23 on transformers passes reasoning as `thinking` too; the kit does not, and warns where it is left out.
    monkeypatch.setattr(chat_template_utils, "_alias_reasoning_fields", lambda chat: chat, raising=False)
    tokenizer = peer(template)
    rendered = 0
    for messages in CONVERSATIONS:
        for tools in ((), (TOOL,)):
            for settings in ({}, {"enable_thinking": False, "date_string": "1 Jan 2026"}):
                for answer_follows in (False, True):
                    theirs = by_transformers(tokenizer, messages, tools, settings, answer_follows)
                    try:
                        ours = template.render(messages, tools=tools, settings=settings, answer_follows=answer_follows)
                    except TemplateRefusal:
                        ours = None
                    assert ours == theirs
                    rendered += ours is not None
    assert rendered >= 24


def by_transformers(tokenizer, messages, tools, settings, answer_follows):
    """The text, with the arguments of tool calls as objects, else as JSON; None where the template refuses."""
    for as_text in (False, True):
        turns = [message.as_turn(arguments_as_text=as_text) for message in messages]
        try:
            return tokenizer.apply_chat_template(
                turns,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=answer_follows,
                **settings,
            )
        except Exception:
            continue
    return None


def test_it_pickles_and_equals_its_copy():
    template = FAMILIES["llama3"].template
    before = template.render([USER])
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template
    assert hash(copy) == hash(template)
    assert copy.render([USER]) == before
    assert copy != ChatTemplate(template.source, {})


def test_a_template_that_wants_arguments_as_text_gets_them():
    template = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% endfor %}",
        {},
    )
    messages = (USER, Message("assistant", "", tool_calls=(CALL,)))
    for _ in range(2):
        assert template.render(messages) == 'get_weather{"city": "Köln", "days": [1, 2]}'
    objects = ChatTemplate("{{ messages[1].tool_calls[0].function.arguments.days[1] }}", {})
    assert objects.render(messages) == "2"


def test_the_form_that_worked_is_tried_first_the_next_time():
    template = ChatTemplate(
        "{% set given = messages[0].tool_calls[0].function.arguments %}"
        "{% if strict is defined and given is mapping %}{{ raise_exception('text, please') }}{% endif %}"
        "{{ given is string }}",
        {},
    )
    messages = (Message("assistant", "", tool_calls=(CALL,)),)
    assert template.render(messages) == "False"
    assert template.render(messages, settings={"strict": True}) == "True"
    assert template.render(messages) == "True"


@pytest.mark.parametrize(("name", "today"), [("llama3_2", True), ("dated", True), ("llama3_1", False)])
def test_a_template_that_writes_the_day_says_so(name, today):
    assert FAMILIES[name].template.uses_today is today


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users, please') }}", "only users, please"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[7].content.strip() }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if %}", "it is not valid Jinja: Expected an expression, got 'end of statement block', line 1"),
    ],
    ids=["raised", "type", "undefined", "arithmetic", "syntax"],
)
def test_a_refusal_says_what_the_template_says(source, message):
    with pytest.raises(TemplateRefusal) as caught:
        ChatTemplate(source, {}).render([USER])
    assert str(caught.value) == message


def test_a_refusal_is_the_first_one_where_both_forms_of_arguments_fail():
    template = ChatTemplate("{{ raise_exception('as ' ~ messages[0].tool_calls[0].function.arguments) }}", {})
    with pytest.raises(TemplateRefusal, match="'city': 'Köln'"):
        template.render([Message("assistant", "", tool_calls=(CALL,))])


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(TemplateRefusal, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}", {}).render([USER])


def test_it_loads_neither_torch_nor_transformers():
    program = "import json, sys, qlora_kit.data.template.spans; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert "qlora_kit.data.template.chat_template" in loaded
    assert not {"torch", "transformers", "datasets", "tokenizers"} & set(loaded)
