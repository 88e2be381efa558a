"""Whatever the conversation says, no byte of a prompt is ever trained, and every whole token of an answer is."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder
from tests.tiny_tokenizers import llama3_tokenizer, smollm_tokenizer

BYTE_OF_LETTER = {letter: value for value, letter in bytes_to_unicode().items()}


@functools.cache
def chatml():
    return smollm_tokenizer()


@functools.cache
def llama3():
    """Offsets trimmed, as in the published tokenizer."""
    tokenizer = llama3_tokenizer()
    raw = tokenizer.backend_tokenizer
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), raw.post_processor])
    return tokenizer


@functools.cache
def encoder_of(make):
    return Encoder.of(make())


def chatml_pieces(messages):
    """(text, whether it is trained) in order, written by hand from the format's definition."""
    for message in messages:
        yield f"<|im_start|>{message.role}\n", False
        yield f"{message.content}<|im_end|>", message.role == "assistant"
        yield "\n", False


def llama3_pieces(messages):
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message.role}<|end_header_id|>\n\n", False
        yield f"{message.content.strip()}<|eot_id|>", message.role == "assistant"


def token_bytes(tokenizer, token_id):
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None:
        return added.content.encode()
    return bytes(BYTE_OF_LETTER[letter] for letter in tokenizer.convert_ids_to_tokens(token_id))


SNIPPETS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "\n\n", "  ", "\t", "é", "🚀", "42", " ok"]
)
TEXT = st.lists(st.one_of(SNIPPETS, st.text(max_size=6)), max_size=5).map("".join)
ANSWER = TEXT.filter(str.strip)


@st.composite
def conversations(draw):
    messages = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXT)), Message("assistant", draw(ANSWER))]
    return Conversation(tuple(messages), "rows.jsonl", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "pieces"), [(chatml, chatml_pieces), (llama3, llama3_pieces)], ids=["chatml", "llama3"]
)
@settings(deadline=None, max_examples=150)
@given(conversation=conversations())
def test_the_mask_covers_answers_and_never_a_prompt(make, pieces, conversation):
    tokenizer = make()
    row = encoder_of(make).row(conversation)
    wanted = [(text.encode(), trained) for text, trained in pieces(conversation.messages)]
    is_answer = [trained for text, trained in wanted for _ in text]
    spelled = [token_bytes(tokenizer, token) for token in row.ids.tolist()]
    assert b"".join(spelled) == b"".join(text for text, _ in wanted)
    place = 0
    for spelling, trained in zip(spelled, row.trained, strict=True):
        covered = is_answer[place : place + len(spelling)]
        place += len(spelling)
        assert trained == all(covered), (spelling, covered)
