"""Opens any artifact with the reader that a user of it would use."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.core.errors import RecipeError
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Answers, Scorer, Scores, gather_scores, predicted_positions
from qlora_kit.evaluation.sixteen_bit import load_sixteen_bit
from qlora_kit.evaluation.stopping import ended_early
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.formats.bnb.load import load_bnb, load_stored
from qlora_kit.formats.compressed.load import load_compressed
from qlora_kit.model.load import quiet_libraries


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter is opened on.

    Attributes:
        folder: the base, in 16 bit or as bitsandbytes stores it.
        write_gguf: writes a model folder as one GGUF file in 16 bit.
    """

    folder: Path
    write_gguf: Callable[[Path, Path], object]


def open_artifact(
    format_name: str, path: Path, tokenizer: PreTrainedTokenizerBase, base: AdapterBase | None = None
) -> Scorer:
    """A scorer for an exported artifact.

    Args:
        format_name: one of `FORMATS`.
        path: the file or folder that the reader opens.
        base: what an adapter is opened on; no other format looks at it.

    Raises:
        RecipeError: no reader is known for the format, or an adapter without a base.
        RunError: the reader cannot load the artifact.
    """
    if format_name in MODELS:
        return TorchScorer(load_exported(format_name, path), int(tokenizer.pad_token_id))
    if format_name == "gguf":
        from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel

        return LlamaCppScorer(LlamaCppModel(path))
    if format_name not in ADAPTERS:
        raise _no_reader(format_name)
    if base is None:
        raise _no_base()
    return ADAPTERS[format_name](path, base, int(tokenizer.pad_token_id))


def load_exported(format_name: str, folder: Path) -> Any:
    """Load an exported folder as a transformers model.

    Raises:
        RecipeError: no reader is known for the format, or it is not one that transformers reads by itself.
        RunError: the reader cannot load the folder.
    """
    if format_name in ADAPTERS:
        raise _no_base()
    if format_name not in MODELS:
        raise _no_reader(format_name)
    quiet_libraries()
    return MODELS[format_name](folder)


def _no_reader(format_name: str) -> RecipeError:
    return RecipeError(f"no reader for the format '{format_name}'; there are {', '.join(FORMATS)}")


def _no_base() -> RecipeError:
    return RecipeError("an adapter is read beside its base, and none is at hand", fix="qlora-kit chat <run directory>")


def _load_quantized(folder: Path) -> Any:
    from qlora_kit.formats.gptqmodel_folders import load_quantized

    return load_quantized(folder)


def _open_peft(folder: Path, base: AdapterBase, pad_token_id: int) -> Scorer:
    return TorchScorer(load_adapter(load_stored(base.folder), folder), pad_token_id)


def _open_gguf_adapter(path: Path, base: AdapterBase, pad_token_id: int) -> Scorer:
    """The adapter on a 16-bit GGUF file of the base that lasts as long as the model is open."""
    from qlora_kit.formats.adapter.llama_lora import LlamaCppLora

    # Beside the exports, where there is room for a model; a temporary folder may lie in memory.
    with tempfile.TemporaryDirectory(prefix=".base.", suffix=".partial", dir=path.resolve().parent.parent) as folder:
        file = Path(folder) / "base.gguf"
        base.write_gguf(base.folder, file)
        # llama.cpp maps the file into memory, and what is mapped outlives its name.
        return LlamaCppScorer(LlamaCppLora(file, path))


# How each format is opened: as a transformers model, beside its base, or by llama.cpp.
MODELS: dict[str, Callable[[Path], Any]] = {
    "merged": load_sixteen_bit,
    "gptq": _load_quantized,
    "awq": _load_quantized,
    "awq_gemv": _load_quantized,
    "compressed": load_compressed,
    "bnb": load_bnb,
}
ADAPTERS: dict[str, Callable[[Path, AdapterBase, int], Scorer]] = {
    "adapter": _open_peft,
    "adapter_gguf": _open_gguf_adapter,
}
FORMATS = (*MODELS, "gguf", *ADAPTERS)


class _LlamaModel(Protocol):
    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> Any: ...

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]: ...

    def close(self) -> None: ...


class LlamaCppScorer:
    """A GGUF file, alone or with an adapter, read by llama.cpp itself."""

    def __init__(self, model: _LlamaModel) -> None:
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
