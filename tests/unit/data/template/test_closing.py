"""The token that ends a trained answer, as the chat template closes it."""

import pytest

from qlora_kit.data.template.closing import closing_id
from tests.tiny_tokenizers import llama3_tokenizer, mistral_tokenizer, qwen_tokenizer


@pytest.mark.parametrize(
    ("make", "token"),
    [(llama3_tokenizer, "<|eot_id|>"), (qwen_tokenizer, "<|im_end|>"), (mistral_tokenizer, "</s>")],
)
def test_it_is_the_one_after_the_answer(make: object, token: str) -> None:
    assert callable(make)
    tokenizer = make()
    assert closing_id(tokenizer) == tokenizer.convert_tokens_to_ids(token)


def test_it_is_the_templates_own_where_the_tokenizer_names_another() -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.eos_token = "<|end_of_text|>"
    assert closing_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_none_without_a_template_or_without_a_closing_token() -> None:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert closing_id(tokenizer) is None
    tokenizer.chat_template = None
    assert closing_id(tokenizer) is None
