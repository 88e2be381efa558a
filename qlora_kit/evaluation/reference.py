"""What every file is compared with: the model as it was trained, or a base as it is stored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora_kit.core.console.lines import log
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.judge import Baselines
from qlora_kit.evaluation.scores import Scorer, Scores
from qlora_kit.runs.run import Run
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import read_headers

FP32_BYTES = 5  # a weight in fp32, with what scoring needs beside the model


@dataclass(frozen=True)
class Reference:
    """What files are compared with: scores of the trained model, or of the base, on held-out rows.

    Attributes:
        twins: mean KL of the rounded 16-bit model by its folder and bits, as far as it was asked for.
    """

    rows: Sequence[TokenRow]
    baselines: Baselines
    twins: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """Of the trained model, or the base that is exported."""
        return self.baselines.reference


def open_models(run: Run) -> dict[str, Scorer]:
    """The models beside a run's files, by the names in `Run.models`, whose last is the reference."""
    if not run.trained:
        return {"base": _open_base(run)}
    adapter, base = _open_trained(run)
    return {"base": base, "adapter": adapter}


def _open_trained(run: Run) -> tuple[Scorer, Scorer]:
    """The trained model (quantized base + adapter), and the same base without its adapter.

    Activations are fp32, so that what is measured against it is the file's error and not the reference's rounding.
    """
    import torch

    from qlora_kit.adapter.attach import load_adapter
    from qlora_kit.evaluation.torch_scorer import TorchScorer
    from qlora_kit.model.device import this_device
    from qlora_kit.model.load import load_base

    base = load_base(run.base.folder, run.quant, compute_dtype=torch.float32)
    if this_device().type == "cpu" and run.quant.kind is not QuantKind.none:
        # The same weights, unpacked once and not at every step; a GPU may lack the memory and does not need it.
        base = base.dequantize().to(torch.float32)
    model = load_adapter(base, run.directory.adapter)
    pad_token_id = int(run.tokenizer.pad_token_id)
    return TorchScorer(model, pad_token_id), TorchScorer(model, pad_token_id, model.disable_adapter)


def _open_base(run: Run) -> Scorer:
    """The base as it is stored, with fp32 activations where they fit."""
    import torch

    from qlora_kit.evaluation.torch_scorer import TorchScorer
    from qlora_kit.memory.free import free_memory_bytes
    from qlora_kit.model.load import load_base

    weights = sum(math.prod(tensor.shape) for tensor in read_headers(run.base.folder).values())
    fits = not torch.cuda.is_available() or weights * FP32_BYTES < free_memory_bytes()
    if not fits:
        log.info("the base is scored in bfloat16: in float32 it does not fit into the GPU's memory")
    dtype = torch.float32 if fits else torch.bfloat16
    model = load_base(run.base.folder, QuantConfig(kind=QuantKind.none), compute_dtype=dtype)
    return TorchScorer(model, int(run.tokenizer.pad_token_id))
