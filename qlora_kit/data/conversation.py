"""What a row says, whatever file and format it came from: typed turns, and which of them are to be learned."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

HASH_BYTES = 16


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes.

    Attributes:
        arguments: a JSON object as text; templates get it as an object, or as this text where they ask for text.
    """

    name: str
    arguments: str
    id: str = ""

    def as_json(self, *, arguments_as_text: bool) -> dict[str, object]:
        """The call as chat templates expect it."""
        arguments: object = self.arguments if arguments_as_text else json.loads(self.arguments)
        named = {"id": self.id} if self.id else {}
        return {**named, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, the text, and what comes with it.

    Attributes:
        reasoning: what the assistant thought before it answered (`reasoning_content` or `thinking` in a row).
        tool_calls: calls of an assistant turn.
        name: of the tool that answers in a `tool` turn, or of the speaker.
        tool_call_id: the call that a `tool` turn answers.
        is_chosen: the row's own wish whether this turn is trained; None where it says nothing.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    is_chosen: bool | None = None

    def as_turn(self, *, arguments_as_text: bool = False) -> dict[str, object]:
        """The turn as chat templates expect it; a key that says nothing is left out."""
        turn: dict[str, object] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = [call.as_json(arguments_as_text=arguments_as_text) for call in self.tool_calls]
        if self.name:
            turn["name"] = self.name
        if self.tool_call_id:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True)
class Conversation:
    """A row of a file: its turns, the last one the assistant's.

    Attributes:
        plain: prompt and completion joined, or a text alone, without a chat template.
        trained_from: assistant turns before this message index belong to the prompt and are not trained.
        tools: JSON schemas of the functions that the assistant may call.
        template_settings: what the row passes to the template by name, such as `enable_thinking`.
        notes: names of what an audit tells about how the row was read.
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    plain: bool = False
    trained_from: int = 0
    tools: tuple[Mapping[str, object], ...] = ()
    template_settings: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """File and line, as errors name them."""
        return f"{self.file}:{self.line}"

    def content_hash(self) -> bytes:
        """`HASH_BYTES` bytes that two rows share only if they say the same; ids, notes and choices do not count."""
        digest = blake2b(digest_size=HASH_BYTES)
        for message in self.messages:
            calls = "".join(f"{call.name}\x00{call.arguments}\x01" for call in message.tool_calls)
            for part in (message.role, message.content, message.reasoning, calls):
                encoded = part.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        for tool in self.tools:
            digest.update(json.dumps(tool, sort_keys=True).encode("utf-8"))
        return digest.digest()
