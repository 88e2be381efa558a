"""A reader's tokens beside those of training: the reference, the comparison, and what a difference is called."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.conversation import Conversation, Message
from qlora_kit.data.encode import Encoder
from qlora_kit.data.template.closing import closing_id
from qlora_kit.data.template.probes import PROBES, Probe
from qlora_kit.evaluation.token_parity.stops import Stops, stop_problems

_AROUND = 40  # characters of a text shown before and after a difference

Messages = Sequence[Message]
Rewriting = Callable[[Messages], Messages]


@dataclass(frozen=True)
class Failure:
    """One thing that a reader sees otherwise than training did.

    Attributes:
        kind: `token ids`, `beginning of text`, `end of generation`, `chat template` or `Modelfile`.
        conversation: name of the trial conversation; empty where it is about none.
        what: the difference in words.
        expected, found: the two texts around it.
        position: of the first token that differs.
    """

    reader: str
    kind: str
    what: str
    conversation: str = ""
    expected: str = ""
    found: str = ""
    position: int | None = None

    def __str__(self) -> str:
        where = f" in the conversation '{self.conversation}'" if self.conversation else ""
        texts = f": trained {self.expected!r}, here {self.found!r}" if self.expected or self.found else ""
        return f"{self.reader}: {self.kind}{where}: {self.what}{texts}"


@dataclass
class TokenParity:
    """What was compared, and what differed.

    Attributes:
        compared: conversations compared, by reader.
        notes: what was left out, and why.
    """

    compared: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every reader sees what was trained."""
        return not self.failures


@dataclass(frozen=True)
class Expected:
    """A trial conversation as training would have written it."""

    probe: Probe
    ids: list[int]


@dataclass(frozen=True)
class Trained:
    """The trained tokenizer, and every trial conversation that its template takes.

    Attributes:
        encoder: writes conversations as training did.
        stop_ids: tokens that may end an answer.
        closing: the one that training closed answers with; None where that cannot be told.
    """

    tokenizer: Any
    encoder: Encoder
    prompts: tuple[Expected, ...]
    stop_ids: frozenset[int]
    closing: int | None

    @classmethod
    def of(cls, tokenizer: Any, stop_ids: Collection[int]) -> "Trained":
        """The reference of a run's tokenizer."""
        encoder = Encoder.of(tokenizer)
        prompts = []
        for probe in PROBES if encoder.template is not None else ():
            ids = _prompt_ids(encoder, probe.messages)
            if ids is not None:
                prompts.append(Expected(probe, ids))
        return cls(tokenizer, encoder, tuple(prompts), frozenset(stop_ids), closing_id(tokenizer))

    def says_the_same(self, expected: Expected, messages: Messages) -> bool:
        """Whether training would have written these messages with the very same tokens."""
        return _prompt_ids(self.encoder, messages) == expected.ids

    @property
    def notes(self) -> list[str]:
        """What could not be compared for want of a rendering."""
        if not self.prompts:
            return ["the trained tokenizer has no chat template, so no conversation was compared"]
        left = len(PROBES) - len(self.prompts)
        return [f"the trained template refuses {left} of {len(PROBES)} conversations"] if left else []


def _prompt_ids(encoder: Encoder, messages: Messages) -> list[int] | None:
    try:
        return encoder.prompt_ids(Conversation((*messages, Message("assistant", "x")), "probe", 1))
    except RecipeError:
        return None  # the template has no place for this conversation


Reading = Callable[[Messages], list[int]]


def judge_stops(contract: TokenParity, trained: Trained, reader: str, stops: Stops) -> None:
    """Add what is wrong with a reader's end-of-generation tokens."""
    show = trained.tokenizer.convert_ids_to_tokens
    for what in stop_problems(stops, trained.stop_ids, trained.closing, lambda token: str(show(token))):
        contract.failures.append(Failure(reader, "end of generation", what))


def compare_all(
    contract: TokenParity, trained: Trained, reader: str, read: Reading, limits: Mapping[str, Rewriting] | None = None
) -> None:
    """Compare a reader's ids of each conversation with those of training.

    Args:
        limits: what the reader is known not to do, and how a client can do it instead. Where the ids differ, the
            conversation is tried again so rewritten, if training would have written it alike; if that mends it, it
            is a note and no failure.
    """
    for expected in trained.prompts:
        contract.compared[reader] = contract.compared.get(reader, 0) + 1
        messages, name = expected.probe.messages, expected.probe.name
        try:
            found = read(messages)
        except Exception as error:  # every reader has errors of its own, and each is a finding
            what = f"it cannot render what the trained template can: {type(error).__name__}: {error}"
            contract.failures.append(Failure(reader, "chat template", what, name))
            continue
        if found == expected.ids:
            continue
        for limit, rewrite in (limits or {}).items():
            again = rewrite(messages)
            if again != messages and trained.says_the_same(expected, again) and read(again) == expected.ids:
                contract.notes.append(f"{reader} {limit} (conversation '{name}')")
                break
        else:
            contract.failures.append(_difference(trained.tokenizer, reader, expected, found))


def _difference(tokenizer: Any, reader: str, expected: Expected, found: list[int]) -> Failure:
    pairs = zip(expected.ids, found, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected.ids), len(found)))
    texts = {
        "expected": _around(tokenizer, expected.ids, place),
        "found": _around(tokenizer, found, place),
        "conversation": expected.probe.name,
        "position": place,
    }
    bos = tokenizer.bos_token_id
    counts = [_leading(ids, bos) for ids in (expected.ids, found)]
    if counts[0] != counts[1]:
        what = f"{counts[1]} beginning-of-text tokens in front, trained with {counts[0]}"
        return _failure(reader, "beginning of text", what, texts)
    left, right = (_token(tokenizer, ids, place) for ids in (expected.ids, found))
    what = f"token {place} was {left} in training and is {right} here"
    same_text = tokenizer.decode(expected.ids) == tokenizer.decode(found)
    return _failure(reader, "token ids" if same_text else "chat template", what, texts)


def _failure(reader: str, kind: str, what: str, texts: Mapping[str, Any]) -> Failure:
    return Failure(reader, kind, what, texts["conversation"], texts["expected"], texts["found"], texts["position"])


def _leading(ids: Sequence[int], token: int | None) -> int:
    return next((i for i, found in enumerate(ids) if found != token), len(ids))


def _token(tokenizer: Any, ids: Sequence[int], place: int) -> str:
    if place >= len(ids):
        return "the end"
    return f"{ids[place]} ({tokenizer.convert_ids_to_tokens(ids[place])!r})"


def _around(tokenizer: Any, ids: Sequence[int], place: int) -> str:
    before = str(tokenizer.decode(ids[:place]))[-_AROUND:]
    return before + str(tokenizer.decode(ids[place:]))[:_AROUND]
