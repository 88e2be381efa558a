"""A GGUF file as llama.cpp itself reads it: probabilities, greedy text, token ids, chat template.

    with LlamaCppModel(file) as model:
        rows = model.log_probabilities(ids, positions)

Scoring goes through the C interface inside the xllamacpp wheel, 6 ms a position with the whole vocabulary for a model
of 135M parameters on two cores, or through the wheel's server where that interface cannot be used, about a second a
position. Nothing is printed and nothing but the loopback interface is used.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import require
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.llama_library import LibraryEngine, LibraryUnusable
from qlora_kit.formats.gguf.llama_server import ServerEngine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MOST_THREADS = 32


class LlamaCppModel:
    """A GGUF file opened by llama.cpp; a context manager.

    Args:
        gguf_file: the file.
        threads: threads of the arithmetic; by default one fewer than this process has cores, at most 32.
        through_server: score through the wheel's server even where the faster way works.

    Raises:
        RecipeError: the xllamacpp package is not installed.
        RunError: there is no such file, or llama.cpp cannot load it.
    """

    def __init__(self, gguf_file: Path, *, threads: int | None = None, through_server: bool = False) -> None:
        require("xllamacpp", "scoring a GGUF file", EXTRA)
        if not gguf_file.is_file():
            raise RunError(f"no GGUF file at {gguf_file}")
        self._file = gguf_file
        self._threads = threads or default_threads()
        self._server: ServerEngine | None = None
        self._engine = self._open_server() if through_server else self._open_engine()
        self._generated = 0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; using it afterwards is an error."""
        self._engine.close()
        if self._server is not None:
            self._server.close()

    @property
    def vocabulary_size(self) -> int:
        """Tokens the file knows, padding tokens included."""
        return self._engine.vocabulary_size

    @property
    def is_native(self) -> bool:
        """Whether scoring goes through the C interface rather than the server."""
        return isinstance(self._engine, LibraryEngine)

    @property
    def tokens_per_second(self) -> float:
        """Speed of every `generate` so far, prompts left out where they can be told apart; 0 before the first."""
        return self._generated / self._seconds if self._seconds else 0.0

    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Natural-log probabilities of the token after each position, at temperature 1.

        Args:
            token_ids: the whole text, special tokens included.
            positions: indices into it; row i is the distribution after `token_ids[: positions[i] + 1]`.

        Returns:
            float32 of shape [len(positions), vocabulary_size].

        Raises:
            RunError: a position outside the text, or llama.cpp failed.
        """
        if not positions or min(positions) < 0 or max(positions) >= len(token_ids):
            raise RunError(f"positions must be within the {len(token_ids)} tokens, got {list(positions)[:5]}")
        return self._engine.log_probabilities(token_ids, positions)

    def top_logprobs(self, token_ids: Sequence[int], positions: Sequence[int], top: int) -> list[dict[int, float]]:
        """For each position the `top` most likely next tokens with their natural-log probability, likeliest first."""
        import numpy as np

        rows = self.log_probabilities(token_ids, positions)
        best = np.argsort(-rows, axis=1, kind="stable")[:, :top]
        return [{int(i): float(row[i]) for i in order} for row, order in zip(rows, best, strict=True)]

    def logprob_of(self, token_ids: Sequence[int], position: int, token: int) -> float:
        """Natural-log probability of one token after `token_ids[: position + 1]`."""
        return float(self.log_probabilities(token_ids, [position])[0, token])

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The greedy continuation; ends before the first token the file names as an end of generation."""
        found, seconds = self._engine.generate(prompt_ids, max_new_tokens)
        self._generated += len(found)
        self._seconds += seconds
        return found

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """The tokens of `generate` as they come."""
        return self._engine.stream(prompt_ids, max_new_tokens)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """llama.cpp's own token ids of a text.

        Args:
            text: any text.
            add_special: put BOS and EOS around it where the file says so.
            parse_special: read the text of a special token as that token.
        """
        return self._engine.tokenize(text, add_special, parse_special)

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation by the file's own chat template, ready for an answer."""
        return self._open_server().apply_template(messages)

    def _open_engine(self) -> LibraryEngine | ServerEngine:
        try:
            return LibraryEngine(self._file, self._threads)
        except LibraryUnusable:
            return self._open_server()

    def _open_server(self) -> ServerEngine:
        if self._server is None:
            self._server = ServerEngine(self._file, self._threads)
        return self._server


def default_threads() -> int:
    """As many threads as leave a core free."""
    # One core stays free: the threads wait for each other many times a token, and where one of them finds its core
    # taken all stand still. Measured on two busy cores: 1 token/s with two threads, 44 with one.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores - 1, _MOST_THREADS))
