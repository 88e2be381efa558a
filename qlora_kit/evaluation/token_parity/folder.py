"""The token contract of a Hugging Face folder in the servers that use transformers' tokenizers."""

from pathlib import Path
from typing import Any

from qlora_kit.data.template.probes import as_turns
from qlora_kit.evaluation.token_parity.compare import (
    Failure,
    Messages,
    Reading,
    TokenParity,
    Trained,
    compare_all,
    judge_stops,
)
from qlora_kit.evaluation.token_parity.stops import transformers_stops

TRANSFORMERS = "transformers"


def compare_folder(contract: TokenParity, trained: Trained, folder: Path) -> None:
    """Compare the tokenizer, template and generation settings of a Hugging Face folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        contract.failures.append(Failure(TRANSFORMERS, "token ids", f"the tokenizer cannot be read: {error}"))
        return
    if trained.prompts and not tokenizer.chat_template:
        contract.failures.append(Failure(TRANSFORMERS, "chat template", "the folder has none"))
    else:
        compare_all(contract, trained, TRANSFORMERS, reading_of(tokenizer))
    if (folder / "config.json").is_file():
        judge_stops(contract, trained, TRANSFORMERS, transformers_stops(folder))


def reading_of(tokenizer: Any) -> Reading:
    """How servers that use transformers' tokenizers read a conversation."""

    def read(messages: Messages) -> list[int]:
        text = tokenizer.apply_chat_template(as_turns(messages), tokenize=False, add_generation_prompt=True)
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    return read
