"""Scores a transformers model: base, adapter, merged, GPTQ and AWQ."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Answers, Scores, gather_scores, predicted_positions

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
        answers: list[list[int]] = []
        stops = _stop_ids(self._model.generation_config)
        began = time.perf_counter()
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(len(prompt) for prompt in batch)
            padded = [[self._pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in batch]
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=self._pad_token_id, eos_token_id=stops
            )
            with self._mode():
                output = self._model.generate(
                    input_ids=torch.tensor(padded, device=self._model.device),
                    attention_mask=torch.tensor(mask, device=self._model.device),
                    generation_config=settings,
                )
            answers += [_until_stop(row, stops) for row in output[:, width:].tolist()]
        seconds = time.perf_counter() - began
        return Answers(answers, sum(len(answer) for answer in answers) / max(seconds, 1e-9))

    def close(self) -> None:
        """Let go of the model and give its memory back."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stop_ids(config: Any) -> list[int]:
    stops = config.eos_token_id
    return list(stops) if isinstance(stops, list) else [stops]


def _until_stop(token_ids: list[int], stops: list[int]) -> list[int]:
    for position, token in enumerate(token_ids):
        if token in stops:
            return token_ids[:position]
    return token_ids
