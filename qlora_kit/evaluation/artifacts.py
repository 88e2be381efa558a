"""Opens any artifact with the reader that a user of it would use."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.core.errors import RecipeError
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Answers, Scorer, Scores, gather_scores, predicted_positions
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.model.device import this_device
from qlora_kit.model.load import load_base, quiet_libraries
from qlora_kit.schema.quant import QuantConfig, QuantKind

FORMATS = ("merged", "gguf", "gptq", "awq")


def open_trained(
    base_folder: Path, adapter: Path, quant: QuantConfig, pad_token_id: int
) -> tuple[TorchScorer, TorchScorer]:
    """The trained model (quantized base + adapter), and the same base without its adapter.

    Activations are fp32, so that what is measured against it is the file's error and not the reference's rounding.
    """
    base = load_base(base_folder, quant, compute_dtype=torch.float32)
    if this_device().type == "cpu" and quant.kind is not QuantKind.none:
        # The same weights, unpacked once and not at every step; a GPU may lack the memory and does not need it.
        base = base.dequantize().to(torch.float32)
    model = load_adapter(base, adapter)
    return TorchScorer(model, pad_token_id), TorchScorer(model, pad_token_id, model.disable_adapter)


def open_artifact(format_name: str, path: Path, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """A scorer for an exported artifact.

    Args:
        format_name: merged, gguf, gptq or awq.
        path: the file or folder that the reader opens.
    """
    if format_name == "gguf":
        return LlamaCppScorer(path)
    return TorchScorer(load_exported(format_name, path), int(tokenizer.pad_token_id))


def load_exported(format_name: str, folder: Path) -> Any:
    """Load an exported folder as a transformers model.

    Raises:
        RecipeError: no reader is known for the format.
    """
    quiet_libraries()
    if format_name == "merged":
        device = this_device()
        # Most CPUs multiply bf16 many times slower than fp32; the weights are the same bf16 values either way.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, use_safetensors=True, trust_remote_code=False
        )
    if format_name in ("gptq", "awq"):
        from qlora_kit.evaluation.quantized import load_quantized

        return load_quantized(folder)
    raise RecipeError(f"no reader for the format '{format_name}'; there are {', '.join(FORMATS)}")


class LlamaCppScorer:
    """A GGUF file, read by llama.cpp itself."""

    def __init__(self, path: Path) -> None:
        from qlora_kit.evaluation.llama_cpp import LlamaCppModel

        self._model: Any = LlamaCppModel(path)
        self._model.__enter__()

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
        return Answers(answers, sum(len(answer) for answer in answers) / max(seconds, 1e-9))

    def close(self) -> None:
        """Stop llama.cpp."""
        self._model.__exit__(None, None, None)
