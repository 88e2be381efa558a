"""Scores what llama.cpp has opened."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Answers, Scores, gather_scores, predicted_positions
from qlora_kit.evaluation.stopping import ended_early


class _Opened(Protocol):
    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> Any: ...

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]: ...

    def close(self) -> None: ...


class LlamaCppScorer:
    """A GGUF file, alone or with an adapter, read by llama.cpp itself."""

    def __init__(self, model: _Opened) -> None:
        self._model = model

    def score(self, rows: Sequence[TokenRow], ids: torch.Tensor | None, top_tokens: int) -> Scores:
        """Scores at every trained position, from llama.cpp's logits over the whole vocabulary."""
        return gather_scores(((row, self._logprobs(row)) for row in rows), ids, top_tokens)

    def _logprobs(self, row: TokenRow) -> torch.Tensor:
        before = [position - 1 for position in predicted_positions(row)]
        return torch.from_numpy(self._model.log_probabilities(row.input_ids, before))

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> Answers:
        """Greedy answers, one prompt after the other."""
        began = time.perf_counter()
        answers = [list(self._model.generate(prompt, max_new_tokens)) for prompt in prompts]
        seconds = time.perf_counter() - began
        speed = sum(len(answer) for answer in answers) / max(seconds, 1e-9)
        return Answers(answers, speed, ended_early(answers, max_new_tokens))

    def close(self) -> None:
        """Stop llama.cpp."""
        self._model.close()
