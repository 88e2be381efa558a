"""What layers will need in a training step, found before there are weights: tensors without values run through.

One layer of each kind goes forward and back, with what its operations make counted as a GPU would take it. That holds
for layers by hand, for those that run plain, and for layers that nobody wrote a formula for.
"""

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import Function, once_differentiable
from torch.nn import Parameter
from torch.utils._pytree import tree_map
from transformers import AttentionInterface

from qlora_kit.engine.attention.rows import SDPA_ROWS, attend_rows, enable_row_attention
from qlora_kit.engine.attention.sinks import enable_sink_attention
from qlora_kit.engine.layer.fast import FastEngine, patch_model
from qlora_kit.engine.layer.layer_needs import KindNeeds, LayerNeeds, Line
from qlora_kit.engine.linear.frozen_weight import FrozenWeight
from qlora_kit.engine.ops.compiled import as_written
from qlora_kit.model.live_memory import LiveMemory
from qlora_kit.model.stacked_experts import StackedExperts
from qlora_kit.model.structure import layers_of, state_carriers
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.model import Attention

ROUNDED = torch.float8_e4m3fn  # stands for weights in few bits: any other format than that of products
OF_ONE = {"training", "layer_idx"}  # attributes that set no kinds of layers apart
LONGEST = 4096  # tokens of a row that is run where layers carry a state: what these need is in proportion to tokens


@dataclass(frozen=True)
class AsTrained:
    """How layers will run.

    Attributes:
        fast: with the fast engine, which speeds experts up where it knows no layers.
        rounded: full names of the modules whose weights are in few bits.
        dtype: of activations.
        is_packed: rows hold several samples.
        row_tokens: of a row, or of a packed sample.
        as_on_gpu: kernels count as a GPU's, not as those of this machine.
    """

    fast: bool
    rounded: Collection[str]
    dtype: torch.dtype = torch.bfloat16
    is_packed: bool = False
    row_tokens: int = 2048
    as_on_gpu: bool = True


def needs_of_layers(model: PeftModel, run: AsTrained) -> LayerNeeds | None:
    """What the layers of a model need; None for layers by hand whose sizes tell it.

    Args:
        model: on the meta device, with its adapter; it is of no other use afterwards.
    """
    base: Any = model.train().get_base_model()
    with FakeTensorMode(), _autocast(run):
        _fake(base, run)
        if run.fast:
            enable_sink_attention(base, is_tried=False)
        is_eager = base.config._attn_implementation == Attention.eager.value  # scores grow with the square of a row
        if state_carriers(base) and not is_eager:
            run = replace(run, row_tokens=min(run.row_tokens, LONGEST))
        live = LiveMemory(as_on_gpu=run.as_on_gpu)
        engine = _engine(model, live) if run.fast else None
        layers = [] if engine is None else [fast.layer for fast in engine.layers]
        goes_in_rows = bool(layers) and enable_row_attention(base) is not None
        if engine is not None and goes_in_rows and engine.keeps_as_told and not _makes_masks(base, run):
            return None
        copies = live.now
        trials = _trials(layers or _plain(base), live)
        takes_bounds = run.is_packed and _attends_without_mask(base)
        for rows in (1, 2):
            with as_written(), live:
                base.base_model(use_cache=False, **_batch(rows, run.row_tokens, takes_bounds=takes_bounds))
    return LayerNeeds([trial.needs(run.row_tokens) for trial in trials], copies)


@contextmanager
def _autocast(run: AsTrained) -> Iterator[None]:
    """Autocast as training has it; peft asks whether that of a GPU is on."""
    is_on, was_on = run.dtype is not torch.float32, torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", run.as_on_gpu and is_on)
    try:
        with torch.autocast("cpu", run.dtype, enabled=is_on):
            yield
    finally:
        torch.set_autocast_enabled("cuda", was_on)


def _engine(model: PeftModel, live: LiveMemory) -> FastEngine:
    engine = patch_model(model, EngineConfig(), None, _no_weight, is_tried=False)
    with live:  # what stays from step to step is made before, and counts apart
        engine.cast_adapters()
    return engine


def _plain(model: nn.Module) -> list[nn.Module]:
    where, _ = layers_of(model)
    return list(model.get_submodule(where).children())


def _makes_masks(model: Any, run: AsTrained) -> bool:
    """Whether rows are longer than a window of the model, whose mask holds every token against every other."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return not run.is_packed and window is not None and run.row_tokens > window


def _attends_without_mask(model: Any) -> bool:
    """Have a model attend as it does over packed samples, if it can."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SDPA_ROWS, attend_rows)
        model.set_attn_implementation(SDPA_ROWS)
    return bool(model.config._attn_implementation == SDPA_ROWS)


def _batch(rows: int, tokens: int, *, takes_bounds: bool) -> Mapping[str, Any]:
    """Rows side by side, or one after another where attention is told their bounds."""
    if not takes_bounds:
        return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long)}
    ids, bounds = torch.zeros(1, rows * tokens, dtype=torch.long), torch.zeros(rows + 1, dtype=torch.int32)
    ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": tokens, "max_length_k": tokens}
    return {"input_ids": ids, "position_ids": ids, **ends}


@dataclass
class _Trial:
    """One layer that stands for all of its kind: goes back as soon as it went forward, and notes what that took.

    Attributes:
        count: how many are of its kind.
        has_trained_input: an earlier layer is trained.
        found: of one row and of two: bytes of the input, kept, and at work.
    """

    layer: Any
    count: int
    live: LiveMemory
    has_trained_input: bool
    found: list[tuple[int, int, int]] = field(default_factory=list)
    result: Any = None

    def __post_init__(self) -> None:
        self.forward = self.layer.forward

    def __call__(self, *given: Any, **settings: Any) -> Any:
        """The layer's result, which nothing behind it has a gradient for."""
        for value in (*given[1:], *settings.values()):
            if isinstance(value, MutableMapping):  # what an earlier layer hands to later ones, such as keys and values
                value.update({name: tree_map(_apart, one) for name, one in value.items()})
        given = (*given[:1], *(_apart(value) for value in given[1:]))
        settings = {name: _apart(value) for name, value in settings.items()}
        hidden = given[0] if given else settings.pop("hidden_states")
        start, live = hidden.detach().requires_grad_(self.has_trained_input), self.live
        before = live.now
        live.begin_peak()
        result = self.forward(start, *given[1:], **settings)
        after = result[0] if isinstance(result, tuple) else result
        kept = live.now - before
        if after.requires_grad:
            torch.autograd.backward([after], [torch.empty_like(after)])
        self.found.append((hidden.nbytes, kept, live.peak - before))
        self.result = tree_map(_apart, result)
        return self.result

    def hand_on(self, *given: Any, **settings: Any) -> Any:
        """What a layer of the same kind gives, in the form that it has: its input."""
        hidden = given[0] if given else settings["hidden_states"]
        return (hidden, *self.result[1:]) if isinstance(self.result, tuple) else hidden

    def needs(self, tokens: int) -> KindNeeds:
        """As lines through what was found for rows of a number of tokens."""
        one_row, two_rows = self.found
        lines = (Line.through((tokens, one), (2 * tokens, two)) for one, two in zip(one_row, two_rows, strict=True))
        return KindNeeds(self.count, *lines)


def _trials(layers: Sequence[Any], live: LiveMemory) -> list[_Trial]:
    """Put a trial into the first layer of each kind, and have the others hand on what they are given."""
    by_kind: dict[tuple[object, ...], list[Any]] = {}
    below_is_trained = False
    for layer in layers:
        by_kind.setdefault((below_is_trained, *_kind(layer)), []).append(layer)
        below_is_trained |= any(parameter.requires_grad for parameter in layer.parameters())
    trials = []
    for (has_trained_input, *_), same in by_kind.items():
        trials.append(trial := _Trial(same[0], len(same), live, bool(has_trained_input)))
        same[0].forward = trial
        for layer in same[1:]:
            layer.forward = trial.hand_on
    return trials


def _apart(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _NoWeight:
    """Stands for the frozen weight of a linear module, which is unpacked for each product."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        self.out_features: int = linear.out_features
        self.in_features: int = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        """See `FrozenWeight`."""
        weight: Tensor = self.linear.weight
        return x @ weight.detach().to(x.dtype).t()

    def backward(self, grad: Tensor) -> Tensor:
        """See `FrozenWeight`."""
        weight: Tensor = self.linear.weight
        return grad @ weight.detach().to(grad.dtype)


def _no_weight(name: str, linear: nn.Module, *, dtype: torch.dtype) -> FrozenWeight:  # noqa: ARG001
    return _NoWeight(linear)


class _Unpacking(Function):
    """A product with a weight that is unpacked for it, forward and back; as bitsandbytes has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: _NoWeight) -> Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.weight.backward(grad), None


def _linear(x: Tensor, *, module: Any, dtype: torch.dtype) -> Tensor:
    y: Tensor = _Unpacking.apply(x.to(dtype), _NoWeight(module))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return y if module.bias is None else y + module.bias


def _fake(model: nn.Module, run: AsTrained) -> None:
    """Give every module tensors without values: weights as they are stored, adapters in 32 bit with gradients."""
    for name, module in model.named_modules():
        is_rounded = name.replace(".base_layer", "") in run.rounded
        for part, parameter in list(module._parameters.items()):
            if parameter is not None:
                is_matrix = part == "weight" or (isinstance(module, StackedExperts) and part in module.stacks)
                kind = torch.float32 if parameter.requires_grad else ROUNDED if is_rounded and is_matrix else run.dtype
                module._parameters[part] = _made(_shape_of(module, part, parameter), kind, parameter.requires_grad)
        for part, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[part] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, LoraLayer) and is_rounded:
            # As peft's layers over bitsandbytes' have it where autocast is on, which a model without weights lacks.
            vars(module)["_cast_input_dtype"] = _as_given
        if isinstance(module, Linear4bit):  # which unpacks nothing that has no values
            vars(module)["compute_dtype"] = run.dtype
            vars(module)["forward"] = partial(_linear, module=module, dtype=run.dtype)


def _as_given(x: Tensor, _dtype: torch.dtype) -> Tensor:
    return x


def _made(shape: Sequence[int], dtype: torch.dtype, is_trained: bool) -> Parameter:
    made = Parameter(torch.empty(shape, dtype=dtype), requires_grad=is_trained)
    if is_trained:
        made.grad = torch.empty_like(made)  # gradients lie in memory of their own, and count apart
    return made


def _shape_of(module: nn.Module, name: str, parameter: Tensor) -> Sequence[int]:
    """Of a parameter as it would be in 16 bit."""
    if isinstance(module, nn.Linear) and name == "weight":
        return module.out_features, module.in_features
    return parameter.shape


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What sets layers apart: the shapes of their weights, and switches of their modules."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    switches = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if (value is None or isinstance(value, bool | str | int | float)) and key not in OF_ONE
    ]
    return *shapes, *switches
