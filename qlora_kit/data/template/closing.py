"""The token that ends an answer, as training saw it."""

from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Texts that llama.cpp ends a generation on without being told; llama_vocab::impl::load in src/llama-vocab.cpp.
LLAMA_CPP_STOPS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>"}
    | {"<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"}
)


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
