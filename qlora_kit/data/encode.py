"""Conversation -> token ids and the mask of loss tokens, with a bare tokenizer that worker processes can hold.

The text and the characters that each answer covers come from `spans`; here they become tokens. A token is trained if it
starts inside an answer, and so is the special token that closes it: without that the model never learns to stop.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qlora_kit.core.bounds import bounded_memory
from qlora_kit.core.errors import RecipeError, is_panic
from qlora_kit.core.terminal import printable
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.template.chat_template import MOST_MEMORY, ChatTemplate, TemplateRefusal
from qlora_kit.data.template.spans import rendered
from qlora_kit.data.template.steering import SteeringTexts, row_notes, steering_texts
from qlora_kit.data.template.turns import RenderedRow, Span, refused
from qlora_kit.data.tokens import Ids, Mask
from qlora_kit.schema.data import TrainOn

PLACES_WORTH_A_LIST = 24

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedRow:
    """One tokenized row.

    Attributes:
        ids: `[L]` uint32.
        trained: `[L]` bool.
        turn_starts: `[K]` int32: the tokens before the first user turn, then where each later user turn begins; empty
            where there is no place to split.
        dropped_reasoning: assistant turns whose reasoning the template left out.
        dropped_text: assistant turns whose text beside tool calls it left out.
        notes: name and detail of what an audit tells about the row; see `RowNote`.
    """

    ids: Ids
    trained: Mask
    turn_starts: npt.NDArray[np.int32]
    dropped_reasoning: int = 0
    dropped_text: int = 0
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and its chat template, as plain values: picklable, without transformers.

    Attributes:
        tokenizer_json: what `tokenizers.Tokenizer.from_str` reads.
        special_ids: tokens that may close a turn.
        bos: the beginning-of-text id that every row starts with; None where the tokenizer adds none.
        eos: the end-of-text id that closes a plain row.
        special_texts: special tokens as text, which should not stand in what a row says.
        added_texts: other added tokens as text; those that the template writes around a turn should not either.
    """

    tokenizer_json: str
    template: ChatTemplate | None
    special_ids: frozenset[int]
    bos: int | None
    eos: int | None
    train_on: TrainOn
    special_texts: tuple[str, ...] = ()
    added_texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", train_on: TrainOn = TrainOn.assistant) -> "Encoder":
        """The encoder of a loaded tokenizer."""
        source = tokenizer.chat_template
        special_tokens: Mapping[str, str] = tokenizer.special_tokens_map
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
        # Added tokens count even where nobody marked them special, as <|im_end|> in some fine-tuned models.
        special = frozenset(tokenizer.all_special_ids).union(tokenizer.added_tokens_decoder)

        def texts_of(is_special: bool) -> tuple[str, ...]:
            added = tokenizer.added_tokens_decoder.values()
            return tuple(sorted(token.content for token in added if token.special is is_special))

        return cls(
            tokenizer_json=tokenizer.backend_tokenizer.to_str(),
            template=ChatTemplate(source, special_tokens) if source else None,
            special_ids=special,
            bos=bos if adds_bos else None,
            eos=tokenizer.eos_token_id,
            train_on=train_on,
            special_texts=texts_of(True),
            added_texts=texts_of(False),
        )

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def _steering(self) -> SteeringTexts:
        """Texts that begin or end a turn where they stand in what a row says."""

        def is_read_as_token(text: str) -> bool:
            token = self._tokenizer.token_to_id(text)
            return token in self._encodings([f"a{text}a"])[0].ids

        return steering_texts(self.special_texts, self.added_texts, self.template, is_read_as_token)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def rows(self, conversations: Sequence[Conversation]) -> list[EncodedRow | RecipeError]:
        """Each conversation tokenized, or why its template or tokenizer cannot do it."""
        texts: list[RenderedRow | RecipeError] = []
        with bounded_memory(MOST_MEMORY):  # once for all of them: setting it costs as much as a rendering
            for conversation in conversations:
                try:
                    texts.append(self._text(conversation))
                except RecipeError as error:
                    texts.append(error)
        good = [text.text for text in texts if isinstance(text, RenderedRow)]
        encodings = iter(self._encodings(good))
        rows: list[EncodedRow | RecipeError] = []
        for conversation, text in zip(conversations, texts, strict=True):
            if isinstance(text, RecipeError):
                rows.append(text)
                continue
            try:
                rows.append(self._row(conversation, text, next(encodings)))
            except RecipeError as error:
                rows.append(error)
        return rows

    def row(self, conversation: Conversation) -> EncodedRow:
        """One conversation tokenized.

        Raises:
            RecipeError: the template cannot render it, or does not close an answer with a special token.
        """
        row = self.rows([conversation])[0]
        if isinstance(row, RecipeError):
            raise row
        return row

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of everything before the last assistant turn, ready to be continued by the model."""
        if conversation.plain:
            text = "".join(message.content for message in conversation.messages[:-1])
        else:
            text = self._prompt(conversation)
        ids: list[int] = self._encodings([text])[0].ids
        return ids if self._has_bos(ids) else [self._bos(), *ids]

    def _encodings(self, texts: list[str]) -> "list[Encoding]":
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            said = str(error).strip().partition("\n")[0]
            raise RecipeError(
                f"the tokenizer of the base fails on a text: {printable(said)}", "model.source"
            ) from error

    def _prompt(self, conversation: Conversation) -> str:
        try:
            return self._chat().render(
                conversation.messages[:-1],
                tools=conversation.tools,
                settings=conversation.template_settings,
                answer_follows=True,
            )
        except TemplateRefusal as refusal:
            raise refused(conversation, refusal) from refusal

    def _text(self, conversation: Conversation) -> RenderedRow:
        if not conversation.plain:
            return rendered(conversation, self._chat(), self.train_on)
        if self.eos is None:
            raise RecipeError("the tokenizer has no end-of-text token, so a plain-text row would never end")
        return _plain(conversation, self.train_on)

    def _row(self, conversation: Conversation, text: RenderedRow, encoding: "Encoding") -> EncodedRow:
        ids: list[int] = encoding.ids
        trained = np.zeros(len(ids), dtype=np.bool_)
        tokens = _Tokens(encoding, text.text, len(text.spans) + len(text.turn_starts))
        for span in text.spans:
            first = tokens.starting_at(span.start)
            if conversation.plain or self.train_on is TrainOn.everything:
                trained[first:] = True
                continue
            last = tokens.closing(span.end, self.special_ids)
            if last is None:
                raise _no_closing(conversation, text.text[span.end :])
            trained[first : last + 1] = True
        cuts = [tokens.starting_at(place) for place in (text.head_end, *text.turn_starts)] if text.turn_starts else []
        front = [] if self._has_bos(ids) else [self._bos()]
        end = [self.eos] if conversation.plain and self.eos is not None else []
        return EncodedRow(
            np.array([*front, *ids, *end], dtype=np.uint32),
            np.concatenate(([False] * len(front), trained, [True] * len(end))).astype(np.bool_),
            np.array([cut + len(front) for cut in cuts], dtype=np.int32),
            text.dropped_reasoning,
            text.dropped_text,
            row_notes(conversation, self._steering),
        )

    def _chat(self) -> ChatTemplate:
        if self.template is None:
            raise RecipeError(
                "the model has no chat template",
                fix="model.chat_template=<a Jinja file> or data.apply_chat_template=false",
            )
        return self.template

    def _has_bos(self, ids: Sequence[int]) -> bool:
        """Whether nothing has to be put in front: the tokenizer adds no BOS, or the template wrote it."""
        return self.bos is None or (len(ids) > 0 and ids[0] == self.bos)

    def _bos(self) -> int:
        assert self.bos is not None
        return self.bos


class _Tokens:
    """Where characters lie in a tokenized text.

    Some tokenizers leave a token's leading space out of its offsets, so a token is taken to start where the one before
    it ended. Most places asked for are token borders, which the quick lookups tell without listing every offset; where
    very many are asked for, listing the offsets once is quicker.
    """

    def __init__(self, encoding: "Encoding", text: str, places: int) -> None:
        self._encoding = encoding
        self._text = text
        self._is_listed = places > PLACES_WORTH_A_LIST

    @cached_property
    def _ends(self) -> list[int]:
        return [end for _, end in self._encoding.offsets]

    @cached_property
    def _starts(self) -> list[int]:
        begins = [begin for begin, _ in self._encoding.offsets]
        return [0, *map(min, begins[1:], self._ends)] if begins else []

    def starting_at(self, place: int) -> int:
        """The first token that starts at a character or after it."""
        at = None if self._is_listed else self._encoding.char_to_token(place)
        if at is not None and self._borders(at)[0] == place and (at == 0 or self._borders(at - 1)[1] == place):
            return int(at)
        return bisect_left(self._starts, place)

    def _borders(self, index: int) -> tuple[int, int]:
        return self._encoding.token_to_chars(index) or (-1, -1)

    def closing(self, end: int, special: frozenset[int]) -> int | None:
        """The token that ends a turn: the first special one after the answer, with only white space between."""
        is_asked = not self._is_listed and end < len(self._text)
        index = self._encoding.char_to_token(end) if is_asked else None
        ids = self._ids
        if index is not None and ids[index] in special:
            return int(index)
        for index in range(bisect_right(self._ends, end), len(ids)):
            if ids[index] in special:
                return index
            if self._text[end : self._ends[index]].strip():
                return None
        return None

    @cached_property
    def _ids(self) -> list[int]:
        ids: list[int] = self._encoding.ids
        return ids


def _plain(conversation: Conversation, train_on: TrainOn) -> RenderedRow:
    """Prompt and completion joined, or a text alone, which is trained from its first character on."""
    contents = [message.content for message in conversation.messages]
    text = "".join(contents)
    start = 0 if train_on is TrainOn.everything or len(contents) == 1 else len(contents[0])
    return RenderedRow(text, (Span(start, len(text)),), (), 0, 0)


def _no_closing(conversation: Conversation, after: str) -> RecipeError:
    return RecipeError(
        "the chat template does not close the assistant's turn with a special token, so the model would never learn to "
        f"stop: after the answer comes {after[:40]!r}",
        where=conversation.place,
        fix="model.chat_template=<a Jinja file that ends an answer with the end-of-turn token>",
    )
