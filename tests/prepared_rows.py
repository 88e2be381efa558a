"""Files of rows, and what `prepare` makes of them."""

import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.prepare import prepare
from tests.tiny_tokenizers import smollm_tokenizer

TOKENIZER = smollm_tokenizer()


def write(path, *pairs):
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def refusal(config):
    with pytest.raises(RecipeError) as caught:
        prepare(config, TOKENIZER)
    return str(caught.value)


def chat_file(path, *rows):
    """Conversations of several turns: each row lists its texts, the user's first."""
    with path.open("w", encoding="utf-8") as file:
        for texts in rows:
            roles = ("user", "assistant")
            turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


def texts(rows):
    return [TOKENIZER.decode(row.input_ids) for row in rows]
