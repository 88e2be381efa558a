"""What is trained of a conversation, written out by hand for every template."""
# ruff: noqa: RUF001  (DeepSeek writes its tokens with full-width bars)

from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message, ToolCall
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.spans import rendered
from qlora_kit.model.demo import demo_base
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES

USER, NEXT = Message("user", "Where is Oslo?"), Message("user", "And Rome?")
ANSWER, LAST = Message("assistant", "In Norway."), Message("assistant", "In Italy.")
CALL = Message("assistant", "", tool_calls=(ToolCall("get_weather", '{"city": "Oslo"}', "call00001"),))
RESULT = Message("tool", "Sunny", name="get_weather", tool_call_id="call00001")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS = {
    "single": (USER, ANSWER),
    "multi": (USER, ANSWER, NEXT, LAST),
    "system": (Message("system", "Be brief."), USER, ANSWER),
    "tools": (Message("user", "Weather in Oslo?"), CALL, RESULT, Message("assistant", "It is sunny.")),
    "reasoning": (USER, Message("assistant", "In Norway.", reasoning="A capital.")),
    "past": (USER, Message("assistant", "In Norway.", reasoning="A capital."), NEXT, LAST),
    "inside": (USER, Message("assistant", "<think>\nA capital.\n</think>\n\nIn Norway.")),
}


class Refused(str):
    """The words of the refusal instead of the trained texts."""


NO_TOOLS = Refused("the chat template leaves the row's tools out of the text")
ALTERNATE = Refused(
    "the chat template refuses this row: Conversation roles must alternate user/assistant/user/assistant/..."
)
# Each trained text, and after a bar what closes it; then the thoughts that the template leaves out.
EXPECTED: dict[str, dict[str, Any]] = {
    "llama3": {
        "single": (["In Norway.|<|eot_id|>"], 0),
        "multi": (["In Norway.|<|eot_id|>", "In Italy.|<|eot_id|>"], 0),
        "system": (["In Norway.|<|eot_id|>"], 0),
        "tools": NO_TOOLS,
        "reasoning": (["In Norway.|<|eot_id|>"], 1),
        "past": (["In Norway.|<|eot_id|>", "In Italy.|<|eot_id|>"], 1),
        "inside": (["<think>\nA capital.\n</think>\n\nIn Norway.|<|eot_id|>"], 0),
    },
    "gemma2": {
        "single": (["In Norway.|<end_of_turn>"], 0),
        "multi": (["In Norway.|<end_of_turn>", "In Italy.|<end_of_turn>"], 0),
        "system": Refused("the chat template refuses this row: System role not supported"),
        "tools": ALTERNATE,
        "reasoning": (["In Norway.|<end_of_turn>"], 1),
        "past": (["In Norway.|<end_of_turn>", "In Italy.|<end_of_turn>"], 1),
        "inside": (["<think>\nA capital.\n</think>\n\nIn Norway.|<end_of_turn>"], 0),
    },
    "chatml": {
        "single": (["In Norway.|<|im_end|>"], 0),
        "multi": (["In Norway.|<|im_end|>", "In Italy.|<|im_end|>"], 0),
        "system": (["In Norway.|<|im_end|>"], 0),
        "tools": NO_TOOLS,
        "reasoning": (["In Norway.|<|im_end|>"], 1),
        "past": (["In Norway.|<|im_end|>", "In Italy.|<|im_end|>"], 1),
        "inside": (["<think>\nA capital.\n</think>\n\nIn Norway.|<|im_end|>"], 0),
    },
    "qwen3": {
        "single": (["<think>\n\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "multi": (["In Norway.|<|im_end|>", "<think>\n\n</think>\n\nIn Italy.|<|im_end|>"], 0),
        "system": (["<think>\n\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "tools": (
            [
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>|<|im_end|>',
                "<think>\n\n</think>\n\nIt is sunny.|<|im_end|>",
            ],
            0,
        ),
        "reasoning": (["<think>\nA capital.\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "past": (["In Norway.|<|im_end|>", "<think>\n\n</think>\n\nIn Italy.|<|im_end|>"], 1),
        "inside": (["<think>\nA capital.\n</think>\n\nIn Norway.|<|im_end|>"], 0),
    },
    # The prompt opens the thought: `<think>\n` is not for the model to write.
    "qwen3_5": {
        "single": (["\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "multi": (["In Norway.|<|im_end|>", "\n</think>\n\nIn Italy.|<|im_end|>"], 0),
        "system": (["\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "tools": (
            [
                "\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
                "</tool_call>|<|im_end|>",
                "\n</think>\n\nIt is sunny.|<|im_end|>",
            ],
            0,
        ),
        "reasoning": (["A capital.\n</think>\n\nIn Norway.|<|im_end|>"], 0),
        "past": (["In Norway.|<|im_end|>", "\n</think>\n\nIn Italy.|<|im_end|>"], 1),
        "inside": (["A capital.\n</think>\n\nIn Norway.|<|im_end|>"], 0),
    },
    "inst_first": {
        "single": (["In Norway.|</s>"], 0),
        "multi": (["In Norway.|</s>", "In Italy.|</s>"], 0),
        "system": (["In Norway.|</s>"], 0),
        "tools": Refused("the chat template refuses this row: no place for a tool turn"),
        "reasoning": (["In Norway.|</s>"], 1),
        "past": (["In Norway.|</s>", "In Italy.|</s>"], 1),
        "inside": (["<think>\nA capital.\n</think>\n\nIn Norway.|</s>"], 0),
    },
    # The thought is cut off the answer but not the blank lines after it.
    "deepseek_r1": {
        "single": (["In Norway.|<｜end▁of▁sentence｜>"], 0),
        "multi": (["In Norway.|<｜end▁of▁sentence｜>", "In Italy.|<｜end▁of▁sentence｜>"], 0),
        "system": (["In Norway.|<｜end▁of▁sentence｜>"], 0),
        "tools": NO_TOOLS,
        "reasoning": (["In Norway.|<｜end▁of▁sentence｜>"], 1),
        "past": (["In Norway.|<｜end▁of▁sentence｜>", "In Italy.|<｜end▁of▁sentence｜>"], 1),
        "inside": (["\n\nIn Norway.|<｜end▁of▁sentence｜>"], 1),
    },
    "gpt_oss": {
        "single": (["<|channel|>final<|message|>In Norway.|<|return|>"], 0),
        "multi": (
            [
                "<|channel|>final<|message|>In Norway.|<|end|>",
                "<|channel|>final<|message|>In Italy.|<|return|>",
            ],
            0,
        ),
        "system": (["<|channel|>final<|message|>In Norway.|<|return|>"], 0),
        "tools": (
            [
                ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}|<|call|>',
                "<|channel|>final<|message|>It is sunny.|<|return|>",
            ],
            0,
        ),
        "reasoning": (["<|channel|>final<|message|>In Norway.|<|return|>"], 1),
        "past": (
            [
                "<|channel|>final<|message|>In Norway.|<|end|>",
                "<|channel|>final<|message|>In Italy.|<|return|>",
            ],
            1,
        ),
        "inside": (["<|channel|>final<|message|><think>\nA capital.\n</think>\n\nIn Norway.|<|return|>"], 0),
    },
}


def alike(family, closing=None, **changes):
    """The expectations of another family with another closing token, and the cases that differ."""
    cases = dict(EXPECTED[family])
    if closing:
        for case, wanted in cases.items():
            if not isinstance(wanted, Refused):
                cases[case] = ([f"{text.rpartition('|<')[0]}|{closing}" for text in wanted[0]], wanted[1])
    return cases | changes


LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Oslo"}}|<|eot_id|>'
EXPECTED["llama3_1"] = alike("llama3", tools=([LLAMA_CALL, "It is sunny.|<|eot_id|>"], 0))
EXPECTED["llama3_2"] = alike("llama3", tools=([LLAMA_CALL, "It is sunny.|<|eot_id|>"], 0))
EXPECTED["gemma3"] = alike("gemma2", system=(["In Norway.|<end_of_turn>"], 0))
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>|<|im_end|>'
EXPECTED["qwen2_5"] = alike("chatml", tools=([QWEN_CALL, "It is sunny.|<|im_end|>"], 0))
EXPECTED["inst_last"] = alike(
    "inst_first",
    system=Refused("the chat template leaves a system turn out of the text"),
    tools=(
        [
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]|</s>',
            "It is sunny.|</s>",
        ],
        0,
    ),
)
EXPECTED["dated"] = alike(
    "inst_first",
    tools=(
        ['[TOOL_CALLS]get_weather[CALL_ID]call00001[ARGS]{"city": "Oslo"}|</s>', "It is sunny.|</s>"],
        0,
    ),
)
EXPECTED["phi3"] = alike("chatml", "<|end|>")
EXPECTED["parted_header"] = alike("chatml")
EXPECTED["default_system"] = alike("chatml")
EXPECTED["two_modes"] = alike("chatml")


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained(family, case):
    wanted = EXPECTED[family][case]
    conversation = Conversation(CONVERSATIONS[case], "rows.jsonl", 7, tools=(TOOL,) if case == "tools" else ())
    if isinstance(wanted, Refused):
        with pytest.raises(RecipeError) as caught:
            rendered(conversation, FAMILIES[family].template, TrainOn.assistant)
        problem = caught.value.problems[0]
        assert (problem.what, problem.where) == (wanted, "rows.jsonl:7")
        assert "model.chat_template=" in problem.fix
        return
    row = rendered(conversation, FAMILIES[family].template, TrainOn.assistant)
    texts, dropped = wanted
    pairs = [text.rpartition("|<") for text in texts]
    assert [row.text[span.start : span.end] for span in row.spans] == [text for text, _, _ in pairs]
    for span, (_, _, closing) in zip(row.spans, pairs, strict=True):
        assert row.text[span.end :].startswith(f"<{closing}")
    assert (row.dropped_reasoning, row.dropped_text) == (dropped, 0)


FRONTS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>user<|end_header_id|>\n\n"),
    "llama3_1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
    ),
    "gemma2": ("<bos>", "<start_of_turn>user\n"),
    "gemma3": ("<bos>", "<start_of_turn>user\n"),
    "qwen2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n",
    ),
    "qwen3": ("", "<|im_start|>user\n"),
    "qwen3_5": ("", "<|im_start|>user\n"),
    "inst_first": ("<s>", "[INST] "),
    "inst_last": ("<s>", "[INST]"),
    "phi3": ("", "<|user|>\n"),
    "parted_header": ("", "<|im_start|>user<|im_sep|>"),
    "default_system": (
        "<|im_start|>system\nYou answer questions about places<|im_end|>\n",
        "<|im_start|>user\n",
    ),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜User｜>"),
    "chatml": ("", "<|im_start|>user\n"),
}


@pytest.mark.parametrize("family", FRONTS)
def test_where_a_long_conversation_may_be_split(family):
    row = rendered(Conversation(CONVERSATIONS["multi"], "", 0), FAMILIES[family].template, TrainOn.assistant)
    head, header = FRONTS[family]
    assert row.text[: row.head_end] == head
    assert row.text.startswith(f"{header}Where is Oslo?", row.head_end)
    assert [row.text[start:].partition("Rome")[0] for start in row.turn_starts] == [f"{header}And "]


@pytest.mark.parametrize("family", ["llama3_2", "dated", "two_modes", "gpt_oss"])
def test_where_it_may_be_split_after_a_long_front(family):
    row = rendered(Conversation(CONVERSATIONS["multi"], "", 0), FAMILIES[family].template, TrainOn.assistant)
    header = {"llama3_2": "<|start_header_id|>user<|end_header_id|>\n\n", "dated": "[INST]"}.get(
        family, "<|start|>user<|message|>" if family == "gpt_oss" else "<|im_start|>user\n"
    )
    assert row.head_end > 40
    assert row.text.startswith(f"{header}Where is Oslo?", row.head_end)
    assert [row.text[start:].partition("Rome")[0] for start in row.turn_starts] == [f"{header}And "]


def test_llama_leaves_out_what_is_said_beside_a_call():
    call = Message("assistant", "Let me see.", tool_calls=CALL.tool_calls)
    conversation = Conversation((USER, call, RESULT, ANSWER), "", 0, tools=(TOOL,))
    assert rendered(conversation, FAMILIES["llama3_1"].template, TrainOn.assistant).dropped_text == 1
    assert rendered(conversation, FAMILIES["qwen2_5"].template, TrainOn.assistant).dropped_text == 0


def test_mistral_shows_its_tools_to_the_last_user_turn_alone():
    conversation = Conversation((*CONVERSATIONS["tools"], NEXT, LAST), "rows.jsonl", 7, tools=(TOOL,))
    with pytest.raises(RecipeError) as caught:
        rendered(conversation, FAMILIES["inst_last"].template, TrainOn.assistant)
    assert "renders earlier turns differently once an answer follows" in str(caught.value)
    assert "'AVAILABLE_TOOLS][" in str(caught.value)
    assert "data.train_on=last" in str(caught.value)
    row = rendered(conversation, FAMILIES["inst_last"].template, TrainOn.last)
    assert [row.text[span.start : span.end] for span in row.spans] == ["In Italy."]
    assert [row.text[start:].partition("{")[0] for start in row.turn_starts] == ["[AVAILABLE_TOOLS]["]


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_5", "llama3_1"])
def test_a_turn_after_the_tools_and_thoughts_that_are_left_out_of_it(family):
    thought = Message("assistant", "", reasoning="Ask.", tool_calls=CALL.tool_calls)
    told = Message("assistant", "It is sunny.", reasoning="Good.")
    conversation = Conversation((USER, thought, RESULT, told, NEXT, LAST), "", 0, tools=(TOOL,))
    row = rendered(conversation, FAMILIES[family].template, TrainOn.assistant)
    texts = [row.text[span.start : span.end] for span in row.spans]
    call = EXPECTED[family]["tools"][0][0].rpartition("|<")[0].removeprefix("\n</think>\n\n")
    last = EXPECTED[family]["multi"][0][1].rpartition("|<")[0]
    assert texts == [call, "It is sunny.", last]
    assert row.dropped_reasoning == 2


@pytest.mark.slow
def test_the_demo_bases_own_template_has_the_form_that_the_tests_use():
    tokenizer = AutoTokenizer.from_pretrained(demo_base())
    published = ChatTemplate(tokenizer.chat_template, {})
    of_form = FAMILIES["default_system"].template
    default = published.render(CONVERSATIONS["single"]).partition("<|im_start|>user")[0]
    ours = of_form.render(CONVERSATIONS["single"]).partition("<|im_start|>user")[0]
    assert default != ours
    for case in ("single", "multi", "system", "inside"):
        rendering = published.render(CONVERSATIONS[case], answer_follows=True)
        assert rendering == of_form.render(CONVERSATIONS[case], answer_follows=True).replace(ours, default)
