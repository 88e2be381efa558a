"""Whether the readers of an artifact see the tokens that were trained: prompts, beginning of text, end of an answer.

    contract = check_token_ids("gguf", folder, file, tokenizer, stop_ids)
    for failure in contract.failures: print(failure)

Twenty fixed conversations go through each reader's own template and tokenizer; what training wrote is the reference.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_kit.evaluation.token_parity.compare import TokenParity, Trained
from qlora_kit.formats.registry import find_format


def check_token_ids(
    format_name: str, folder: Path, file: str, tokenizer: Any, stop_ids: Collection[int]
) -> TokenParity:
    """Compare every reader of an artifact with the trained tokenizer.

    Args:
        format_name: of the artifact.
        folder: the artifact's.
        file: the path inside it that a reader opens.
        tokenizer: the one that the run trained with.
        stop_ids: ids that may end an answer, the trained one among them.
    """
    trained = Trained.of(tokenizer, stop_ids)
    contract = TokenParity(notes=trained.notes)
    find_format(format_name).check_tokens(contract, trained, folder, file)
    return contract
