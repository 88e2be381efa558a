"""Answers of a GGUF file as they come."""

from collections.abc import Iterator
from pathlib import Path

from qlora_kit.formats.format import ChatStream
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.model.tokenizer import load_tokenizer


def open_gguf_chat(path: Path) -> ChatStream:
    """What answers with a file at exports/<name>/<file>."""
    # exports/<name>/<file>: what lies beside exports/ holds the tokenizer that turns token ids into text.
    home = path.parent.parent.parent
    tokenizer = load_tokenizer(home / "adapter" if (home / "adapter").is_dir() else home / "tokenizer")
    model = LlamaCppModel(path)

    def speak(messages: list[dict[str, str]], max_new_tokens: int) -> Iterator[str]:
        prompt = model.tokenize(model.apply_template(messages), add_special=True, parse_special=True)
        token_ids: list[int] = []
        shown = ""
        for token in model.stream(prompt, max_new_tokens):
            token_ids.append(token)
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                yield text[len(shown) :]
                shown = text

    return speak
