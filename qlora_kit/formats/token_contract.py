"""Whether the readers of an artifact see the tokens that were trained: prompts, beginning of text, end of an answer.

    contract = check_token_ids("gguf", folder, file, tokenizer, stop_ids)
    for failure in contract.failures: print(failure)

Twenty fixed conversations go through each reader's own template and tokenizer; what training wrote is the reference.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_kit.data.template.probes import as_turns
from qlora_kit.evaluation.contract_compare import (
    Failure,
    Messages,
    Reading,
    TokenContract,
    Trained,
    compare_all,
    judge_stops,
)
from qlora_kit.evaluation.contract_stops import transformers_stops
from qlora_kit.formats.gguf.token_contract import check_gguf

TRANSFORMERS = "transformers"


def check_token_ids(
    format_name: str, folder: Path, file: str, tokenizer: Any, stop_ids: Collection[int]
) -> TokenContract:
    """Compare every reader of an artifact with the trained tokenizer.

    Args:
        format_name: `gguf` for llama.cpp and the Modelfile beside the file; any other is a folder for transformers.
        folder: the artifact's.
        file: the path inside it that a reader opens.
        tokenizer: the one that the run trained with.
        stop_ids: ids that may end an answer, the trained one among them.
    """
    trained = Trained.of(tokenizer, stop_ids)
    contract = TokenContract(notes=trained.notes)
    if format_name == "gguf":
        compare_all(contract, trained, TRANSFORMERS, reading_of(tokenizer))
        check_gguf(contract, trained, folder, folder / file)
    elif file.endswith(".gguf"):
        contract.notes.append("a GGUF adapter has no tokenizer of its own: its base's GGUF file decides")
    else:
        check_folder(contract, trained, folder)
    return contract


def check_folder(contract: TokenContract, trained: Trained, folder: Path) -> None:
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
        judge_stops(contract, trained, TRANSFORMERS, transformers_stops(folder, tokenizer))


def reading_of(tokenizer: Any) -> Reading:
    """How servers that use transformers' tokenizers read a conversation."""

    def read(messages: Messages) -> list[int]:
        text = tokenizer.apply_chat_template(as_turns(messages), tokenize=False, add_generation_prompt=True)
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    return read
