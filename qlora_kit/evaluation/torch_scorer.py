"""Scores a transformers model: base, adapter, and what an export is loaded as."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Answers, Scores, gather_scores, predicted_positions
from qlora_kit.evaluation.stopping import stop_tokens, until_stop

ROWS_AT_ONCE = 4


class TorchScorer:
    """A causal language model in this process."""

    def __init__(
        self, model: Any, pad_token_id: int, mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: transformers or peft model; switched to eval mode.
            pad_token_id: fills the left of shorter prompts; masked out.
            mode: context in which every forward pass runs, such as one that turns the adapter off.
        """
        self._model = model.eval()
        self._pad_token_id = pad_token_id
        self._mode = mode

    @contextmanager
    def lent(self) -> Iterator[Any]:
        """The model itself in its mode, for a library that runs it."""
        with self._mode():
            yield self._model

    @torch.no_grad()
    def score(self, rows: Sequence[TokenRow], ids: torch.Tensor | None, top_tokens: int) -> Scores:
        """Scores at every trained position, from full-vocabulary log-softmax in fp32."""
        return gather_scores(self._logprobs(rows), ids, top_tokens)

    def _logprobs(self, rows: Sequence[TokenRow]) -> Iterator[tuple[TokenRow, torch.Tensor]]:
        """Rows share forward passes, padded on the right, where causal attention does not look."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            width = max(len(row.input_ids) for row in batch)
            padded = [list(row.input_ids) + [self._pad_token_id] * (width - len(row.input_ids)) for row in batch]
            with self._mode():
                logits = self._model(input_ids=torch.tensor(padded, device=self._model.device), use_cache=False).logits
            for row, of_row in zip(batch, logits, strict=True):
                before = [position - 1 for position in predicted_positions(row)]
                yield row, torch.log_softmax(of_row[before].float(), dim=-1)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> Answers:
        """Greedy answers in left-padded batches."""
        answers: list[tuple[list[int], bool]] = []
        stops = stop_tokens(self._model.generation_config)
        began = time.perf_counter()
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(len(prompt) for prompt in batch)
            padded = [[self._pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in batch]
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=self._pad_token_id,
                eos_token_id=stops or None,
            )
            with self._mode():
                output = self._model.generate(
                    input_ids=torch.tensor(padded, device=self._model.device),
                    attention_mask=torch.tensor(mask, device=self._model.device),
                    generation_config=settings,
                )
            answers += [until_stop(row, stops) for row in output[:, width:].tolist()]
        seconds = time.perf_counter() - began
        token_ids = [answer for answer, _ in answers]
        speed = sum(len(answer) for answer in token_ids) / max(seconds, 1e-9)
        return Answers(token_ids, speed, [stopped for _, stopped in answers])

    def close(self) -> None:
        """Let go of the model and give its memory back."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
