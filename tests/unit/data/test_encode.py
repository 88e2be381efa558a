"""The loss mask on the chat templates of every family, and what it refuses."""

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder
from qlora_kit.data.tokens import TokenRow
from tests.tiny_tokenizers import (
    CHATML,
    gemma_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
    smollm_tokenizer,
)

TOKENIZERS = {
    "smollm": (smollm_tokenizer, "<|im_end|>"),
    "llama3": (llama3_tokenizer, "<|eot_id|>"),
    "qwen": (qwen_tokenizer, "<|im_end|>"),
    "gemma": (gemma_tokenizer, "<end_of_turn>"),
    "phi3": (phi3_tokenizer, "<|end|>"),
    "mistral": (mistral_tokenizer, "</s>"),
}
FAMILY = pytest.mark.parametrize(("make", "closing"), TOKENIZERS.values(), ids=TOKENIZERS)

# As Qwen3's: the last answer gets an empty thought, earlier ones lose theirs.
THINKING = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{% if '</think>' in message['content'] %}{{ message['content'] }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + message['content'] }}{% endif %}"
    "{% else %}{{ message['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def token_row(conversation, tokenizer):
    row = Encoder.of(tokenizer).row(conversation)
    return TokenRow(tuple(row.ids.tolist()), tuple(row.trained.tolist()), conversation.file, conversation.line)


def prompt_ids(conversation, tokenizer):
    return Encoder.of(tokenizer).prompt_ids(conversation)


def chat(*turns, system=None, plain=False, trained_from=0):
    messages = [Message("system", system)] if system else []
    messages += [Message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)]
    return Conversation(tuple(messages), "rows.jsonl", 7, plain, trained_from)


def trained_texts(row, tokenizer):
    """The text of each run of loss tokens."""
    runs, current = [], []
    for token, trained in zip(row.input_ids, row.trained, strict=True):
        if trained:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    runs += [current] if current else []
    return [tokenizer.decode(run, skip_special_tokens=False).strip() for run in runs]


@FAMILY
def test_every_answer_and_the_token_that_closes_it_are_trained(make, closing):
    tokenizer = make()
    row = token_row(chat("turn it on, 42%", 'done: {"a":1}', "and now?", "Größe 🚀 done"), tokenizer)
    assert trained_texts(row, tokenizer) == [f'done: {{"a":1}}{closing}', f"Größe 🚀 done{closing}"]
    assert (row.file, row.line) == ("rows.jsonl", 7)


@pytest.mark.parametrize("name", ["smollm", "llama3", "qwen", "phi3", "gemma"])
def test_a_system_text_is_not_trained(name):
    make, closing = TOKENIZERS[name]
    tokenizer = make()
    row = token_row(chat("hi", "hello", system="hello"), tokenizer)
    assert trained_texts(row, tokenizer) == [f"hello{closing}"]


def test_a_default_system_text_of_the_template_is_not_trained():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = "<|im_start|>system\nYou are helpful<|im_end|>\n" + CHATML
    row = token_row(chat("hi", "You are helpful"), tokenizer)
    assert trained_texts(row, tokenizer) == ["You are helpful<|im_end|>"]
    assert row.trained[:8] == (False,) * 8


def test_text_after_the_closing_token_is_not_trained():
    tokenizer = smollm_tokenizer()
    row = token_row(chat("hi", "hello"), tokenizer)
    assert tokenizer.decode(row.input_ids[-2:]) == "<|im_end|>\n"
    assert row.trained[-2:] == (True, False)


@FAMILY
def test_a_row_has_exactly_one_bos_where_the_model_has_one(make, closing):
    tokenizer = make()
    row = token_row(chat("hi", "hello"), tokenizer)
    adds_one = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert row.input_ids.count(tokenizer.bos_token_id) == (1 if adds_one else 2 if make is smollm_tokenizer else 0)
    without = make()
    without.chat_template = without.chat_template.replace("{{ bos_token }}", "")
    assert token_row(chat("hi", "hello"), without).input_ids == row.input_ids


@FAMILY
def test_a_prompt_is_the_row_up_to_the_last_answer(make, closing):
    tokenizer = make()
    conversation = chat("hi", "hello", "more", "answer")
    row, prompt = token_row(conversation, tokenizer), prompt_ids(conversation, tokenizer)
    assert tuple(prompt) == row.input_ids[: len(prompt)]
    assert not row.trained[len(prompt) - 1]
    assert row.trained[len(prompt)]


def test_answers_inside_a_prompt_stay_untrained():
    tokenizer = smollm_tokenizer()
    row = token_row(chat("hi", "hello", "more", "answer", trained_from=3), tokenizer)
    assert trained_texts(row, tokenizer) == ["answer<|im_end|>"]


@pytest.mark.parametrize("answer", ["<think>\nhm\n</think>\n\nyes", "yes", "n", "think"])
def test_a_template_that_rewrites_earlier_answers(answer):
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = THINKING
    row = token_row(chat("a", answer, "b", answer), tokenizer)
    last = answer if "</think>" in answer else f"<think>\n\n</think>\n\n{answer}"
    assert trained_texts(row, tokenizer) == [f"{answer.split('</think>')[-1].strip()}<|im_end|>", f"{last}<|im_end|>"]


def test_an_answer_that_holds_the_closing_token_is_trained_to_its_end():
    tokenizer = smollm_tokenizer()
    row = token_row(chat("a", "x<|im_end|>y"), tokenizer)
    assert trained_texts(row, tokenizer) == ["x<|im_end|>y<|im_end|>"]


def test_a_closing_token_that_is_not_marked_special_is_known():
    tokenizer = smollm_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|turn_end|>")
    row = token_row(chat("a", "b"), tokenizer)
    assert trained_texts(row, tokenizer) == ["b<|turn_end|>"]


def test_a_space_before_the_closing_token_is_trained_with_it():
    tokenizer = mistral_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos", "message['content'] + ' ' + eos"
    )
    row = token_row(chat("a", "b"), tokenizer)
    assert row.trained[-2:] == (True, True)
    assert trained_texts(row, tokenizer) == ["b </s>"]


def test_a_trimmed_offset_does_not_pull_the_prompts_space_into_the_answer():
    tokenizer = llama3_tokenizer()
    raw = tokenizer.backend_tokenizer
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), raw.post_processor])
    conversation = chat("the quick ", "brown fox", plain=True)
    encoded = tokenizer("the quick brown fox", add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    straddling = next(index for index, (start, end) in enumerate(offsets) if end > len("the quick "))
    assert tokenizer.decode(encoded["input_ids"][straddling])[0] == " "
    assert offsets[straddling][0] == len("the quick ")  # what the library claims
    row = token_row(conversation, tokenizer)
    assert not row.trained[1 + straddling]
    assert row.trained[2 + straddling]


def test_a_plain_row_is_prompt_completion_and_end_of_text():
    tokenizer = llama3_tokenizer()
    conversation = chat("2 + 2 =", " 4", plain=True)
    row = token_row(conversation, tokenizer)
    assert tokenizer.decode(row.input_ids) == "<|begin_of_text|>2 + 2 = 4<|eot_id|>"
    assert trained_texts(row, tokenizer) == ["4<|eot_id|>"]
    prompt = prompt_ids(conversation, tokenizer)
    assert tokenizer.decode(prompt) == "<|begin_of_text|>2 + 2 ="
    assert tuple(prompt) == row.input_ids[: len(prompt)]


def refusal(conversation, tokenizer):
    with pytest.raises(RecipeError) as caught:
        token_row(conversation, tokenizer)
    return str(caught.value)


def test_a_template_that_changes_the_prompt_once_an_answer_follows_is_refused():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nWell: ")
    message = refusal(chat("hi", "hello"), tokenizer)
    assert "renders earlier turns differently once an answer follows" in message
    assert "'Well: ' became 'hello<|im_end|>\\n'" in message
    assert "rows.jsonl:7" in message
    assert "model.chat_template=" in message


def test_a_template_that_hides_the_answer_is_refused():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = CHATML.replace("+ message['content'] +", "+ message['content'] | upper +")
    assert "the chat template leaves a user turn out of the text" in refusal(chat("hi", "hello"), tokenizer)


def test_a_template_without_a_closing_token_is_refused():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    message = refusal(chat("hi", "hello"), tokenizer)
    assert "does not close the assistant's turn with a special token" in message
    assert "after the answer comes '\\n'" in message
    assert "rows.jsonl:7" in message


def test_a_template_that_refuses_a_row_is_quoted():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    message = refusal(chat("hi", "hello", system="be brief"), tokenizer)
    assert "the chat template refuses this row: System role not supported" in message
    assert "rows.jsonl:7" in message


def test_a_model_without_a_template_is_refused_with_the_ways_out():
    tokenizer = smollm_tokenizer()
    tokenizer.chat_template = None
    message = refusal(chat("hi", "hello"), tokenizer)
    assert "the model has no chat template" in message
    assert "data.apply_chat_template=false" in message


def test_a_plain_row_needs_an_end_of_text_token():
    tokenizer = smollm_tokenizer()
    tokenizer.eos_token = None
    assert "has no end-of-text token" in refusal(chat("hi", "hello", plain=True), tokenizer)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("normalizer", normalizers.Replace("", "x")),
        ("pre_tokenizer", pre_tokenizers.Split(Regex("(a+)+$"), "isolated")),
    ],
    ids=["nothing replaced by something", "a pattern that never ends"],
)
def test_a_tokenizer_whose_compiled_part_fails_is_refused(part, what):
    tokenizer = smollm_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, what)
    assert "the tokenizer of the base fails on a text: " in refusal(chat("hi", "a" * 40 + "b"), tokenizer)
