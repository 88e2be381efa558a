"""Turns of long conversations are where the general method finds them, at a cost that grows with the length alone."""

import time

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.long_rows import LONG
from qlora_kit.data.template.scaffold import found_by_scaffold
from qlora_kit.data.template.spans import rendered, trained_turns
from qlora_kit.data.template.turns import MOST_TURNS, found_by_rendering
from qlora_kit.schema.data import TrainOn
from tests.chat_templates import FAMILIES
from tests.tiny_tokenizers import smollm_tokenizer


def long_row(turns, *front):
    pair = (lambda n: Message("user", f" ask {n}?\n"), lambda n: Message("assistant", f"It is {n}. "))
    return Conversation((*front, *(pair[n % 2](n) for n in range(turns))), "a.jsonl", 7)


@pytest.mark.parametrize("train_on", [TrainOn.assistant, TrainOn.last])
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_where_the_general_method_finds_them(family, system, train_on):
    if system and not FAMILIES[family].system:
        pytest.skip("takes no system turn")
    front = (Message("system", "Be brief."),) if system else ()
    row, template = long_row(LONG + 8, *front), FAMILIES[family].template
    trained = trained_turns(row, train_on)
    assert found_by_scaffold(row, template, trained) == found_by_rendering(row, template, trained)


def test_chosen_turns_are_found_too():
    row, template = long_row(40), FAMILIES["qwen3"].template
    for trained in [(3, 21), (1,), (39,), ()]:
        assert found_by_scaffold(row, template, trained) == found_by_rendering(row, template, trained)


def test_a_template_that_writes_turns_differently_is_left_to_the_general_method():
    template = ChatTemplate(
        "{% for m in messages %}{{ loop.index }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ messages|length + 1 }}<|im_start|>assistant\n{% endif %}",
        {},
    )
    row = long_row(40)
    expected = found_by_rendering(row, template, (1, 3, 39))
    assert rendered(row, template, TrainOn.assistant).spans[:2] == expected.spans[:2]
    assert found_by_scaffold(row, template, (1, 3, 39)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["chatml", "qwen3", "two_modes", "llama3"])
def test_two_thousand_turns_take_seconds(family):
    tokenizer = smollm_tokenizer()
    encoder = Encoder.of(tokenizer)
    object.__setattr__(encoder, "template", FAMILIES[family].template)
    object.__setattr__(encoder, "special_ids", frozenset(range(10_000)))
    began = time.process_time()
    row = encoder.row(long_row(2000))
    assert time.process_time() - began < 5
    text = tokenizer.decode(row.ids[row.trained])
    assert text.count("It is ") == 1000


def test_turns_that_are_told_apart_one_by_one_have_a_limit():
    thinking = tuple(
        Message("assistant", f"It is {n}.", reasoning="hm") if n % 2 else Message("user", "ask")
        for n in range(MOST_TURNS + 2)
    )
    with pytest.raises(RecipeError) as caught:
        rendered(Conversation(thinking, "a.jsonl", 7), FAMILIES["qwen3"].template, TrainOn.assistant)
    assert "502 turns; a conversation whose turns carry more than their texts" in str(caught.value)
