"""The tokens that steer a model rather than say something: which there are, and how the chat template uses them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qlora_kit.data.conversation import Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special and added tokens by their part.

    Attributes:
        names: every one of them as text, by id.
        stops: where generation ends: the tokenizer's end token and those of the generation config.
        adds_bos: the tokenizer puts `bos` in front of a text by itself.
        frames: tokens that the template puts around turns of plain text.
        written: tokens that stand in the template's own text.
        opening, closing: tokens that the template writes once for each turn, before and after it; None where it has
            no such pair.
        bos_per_row: how often the template writes `bos` in a conversation of four turns.
    """

    names: Mapping[int, str]
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    stops: frozenset[int]
    adds_bos: bool
    frames: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    opening: int | None = None
    closing: int | None = None
    bos_per_row: int = 0

    def name(self, token: int | None) -> str:
        """The token as text, or that there is none."""
        return "none" if token is None else self.names.get(token, f"token {token}")

    def codes(self) -> npt.NDArray[np.int16]:
        """`[V]` int16: 0 for ordinary tokens, else 1 + the place of the token in `names`; the last entry is 0."""
        table = np.zeros(max(self.names, default=0) + 2, dtype=np.int16)
        for code, token in enumerate(self.names, start=1):
            table[token] = code
        return table


def special_tokens(tokenizer: "PreTrainedTokenizerFast", stop_ids: frozenset[int]) -> SpecialTokens:
    """Ask a tokenizer and its chat template for their special tokens.

    Args:
        stop_ids: where generation ends, as the generation config says; the tokenizer's end token is added.
    """
    # Added tokens count even where nobody marked them special, as <|im_end|> in some fine-tuned models.
    ids = sorted(set(tokenizer.all_special_ids).union(tokenizer.added_tokens_decoder, stop_ids))
    names = {token: _name(tokenizer, token) for token in ids}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    source = str(tokenizer.chat_template or "")
    two, four = _framing(tokenizer, 1), _framing(tokenizer, 2)
    opening, closing = _pair([token for token in two if token in names], [token for token in four if token in names])
    # Templates name some tokens by variables, such as bos_token.
    variables = {str(key): str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return SpecialTokens(
        names=names,
        bos=bos,
        eos=eos,
        pad=tokenizer.pad_token_id,
        unk=tokenizer.unk_token_id,
        stops=stop_ids | ({eos} if eos is not None else frozenset()),
        adds_bos=bos is not None and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos],
        frames=frozenset(names).intersection(four),
        written=frozenset(
            token
            for token, name in names.items()
            if name in source or any(key in source and value == name for key, value in variables.items())
        ),
        opening=opening,
        closing=closing,
        bos_per_row=four.count(bos) if bos is not None else 0,
    )


def _framing(tokenizer: "PreTrainedTokenizerFast", exchanges: int) -> list[int]:
    """Ids of a conversation of plain words, or nothing where the template does not render one."""
    exchange = (Message("user", "a"), Message("assistant", "b"))
    if not tokenizer.chat_template:
        return []
    try:
        text = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map).render(exchange * exchanges)
    except TemplateRefusal:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _pair(two: list[int], four: list[int]) -> tuple[int | None, int | None]:
    """The tokens before and after each turn: the first and last of those that two more turns add twice."""
    added = [token for token in dict.fromkeys(four) if four.count(token) - two.count(token) == 2]
    return (added[0], added[-1]) if len(added) > 1 else (None, None)


def _name(tokenizer: "PreTrainedTokenizerFast", token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token)) if 0 <= token < len(tokenizer) else f"token {token}"
