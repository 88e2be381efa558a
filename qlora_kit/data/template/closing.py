"""The token that ends an answer, as training saw it."""

from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def closing_id(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """Id of the last token that a trained answer teaches, so the one that a served model writes to stop.

    None where the tokenizer has no chat template, or one that does not close an answer with a special token.
    """
    turns = (Message("user", "Say yes."), Message("assistant", "yes"))
    try:
        row = Encoder.of(tokenizer).row(Conversation(turns, "closing token", 1))
    except RecipeError:
        return None
    trained = [int(token) for token, is_trained in zip(row.ids, row.trained, strict=True) if is_trained]
    return trained[-1] if trained else None
