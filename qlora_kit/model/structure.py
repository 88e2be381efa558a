"""What a decoder is made of, told by its structure rather than by its family's name."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.model.direct_reads import read_directly
from qlora_kit.model.stacked_experts import StackedExperts

LINEAR = (nn.Linear, Conv1D)  # the latter holds its map the other way around, [inputs, outputs], as in GPT-2
_GATES = ("gate", "router")


@dataclass(frozen=True)
class Weights:
    """The weights of one module, the tensors of its children aside.

    Attributes:
        name: of the module.
        kind: linear, router, head, embedding, experts, convolution, small (norms, biases and other vectors) or other.
        count: of its weights; biases of a linear module or of experts count by themselves, as they are never quantized.
        shape: of its matrix as it is stored, mostly [outputs, inputs]; empty where it is none.
    """

    name: str
    kind: str
    count: int
    shape: tuple[int, ...] = ()

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rsplit(".", 1)[-1]


def layers_of(model: nn.Module) -> tuple[str, int]:
    """Where the decoder's layers lie and how many they are; an empty name where the model has none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, layers = max(outer, key=lambda pair: _size(pair[1]), default=("", nn.ModuleList()))
    return name, len(layers)


def weights_of(model: PreTrainedModel) -> list[Weights]:
    """Every module that holds weights of its own, each tensor counted once, in the model's order."""
    head = model.get_output_embeddings()
    routers = frozenset(router_names(model))
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        own = [weight for weight in module.parameters(recurse=False) if id(weight) not in seen]
        seen.update(id(weight) for weight in own)
        if not own:
            continue
        kind = "head" if module is head else "router" if name in routers else _kind(module)
        if kind == "other" and any(word in name.rpartition(".")[2] for word in _GATES):
            kind = "router"
        matrix = next((tuple(weight.shape) for weight in own if weight.ndim == 2), ())
        axes = 2 if isinstance(module, LINEAR) else 3 if kind == "experts" else 0
        biases = sum(weight.numel() for weight in own if weight.ndim < axes)
        found.append(Weights(name, kind, sum(weight.numel() for weight in own) - biases, matrix))
        if biases:
            found.append(Weights(f"{name}.bias", "small", biases))
    return found


def router_names(model: nn.Module) -> list[str]:
    """Linear modules that are called routers, choose among experts, or scale a shared one."""
    called = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "router" in name.rpartition(".")[2]
    }
    return sorted(called | set(_routers(model)))


def kept_whole(model: PreTrainedModel) -> list[str]:
    """Linear modules that are not quantized: the output head, routers, and those whose weight other code reads."""
    return [*_heads(model), *router_names(model), *read_directly(model)]


def not_adapted(model: PreTrainedModel) -> dict[str, str]:
    """Linear modules that carry no LoRA whatever a recipe's targets say, with the reason."""
    layers, _ = layers_of(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    outside = {name: "outside of the layers" for name in linears if not name.startswith(f"{layers}.")}
    past = {name: f"{kind} reads its weight itself, past LoRA" for name, kind in read_directly(model).items()}
    routers = dict.fromkeys(router_names(model), "a router")
    return {**outside, **past, **routers, **dict.fromkeys(_heads(model), "the output head")}


def _heads(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def has_attention(model: PreTrainedModel) -> bool:
    """Whether any layer attends, and not all of them carry a state alone."""
    return getattr(model.config.get_text_config(), "num_attention_heads", None) is not None


def state_carriers(model: nn.Module) -> list[str]:
    """Modules of the layers that carry a state from token to token: they hold a convolution over the tokens.

    State-space layers, linear attention and short convolutions all do. One that held none would not be found.
    """
    layers, _ = layers_of(model)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{layers}.") and any(_goes_over_tokens(child) for child in module.children())
    ]


def _goes_over_tokens(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups > 1 and module.kernel_size[0] > 1


def transposed_modules(model: nn.Module) -> list[str]:
    """Modules that hold a linear map the other way around, [inputs, outputs], as GPT-2's do."""
    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def _routers(model: nn.Module) -> Iterator[str]:
    """Those beside experts: with one output an expert, or one alone."""
    for name, module in model.named_modules():
        choices = _experts(name, module)
        if choices == 0:
            continue
        prefix = name.rpartition(".")[0]
        block = model.get_submodule(prefix)
        for inner, linear in block.named_modules(prefix=prefix):
            gates = any(word in inner.removeprefix(prefix) for word in _GATES)
            if isinstance(linear, nn.Linear) and gates and linear.out_features in (1, choices):
                yield inner


def _experts(name: str, module: nn.Module) -> int:
    """How many experts a module holds: in one tensor of three dimensions, or in a list; 0 where it holds none."""
    if isinstance(module, StackedExperts):
        return module.experts
    if isinstance(module, nn.ModuleList):
        return len(module) if "expert" in name.rpartition(".")[2] else 0
    if _is_convolution(module):
        return 0
    return next((weight.shape[0] for weight in module.parameters(recurse=False) if weight.ndim == 3), 0)


def _kind(module: nn.Module) -> str:
    own = list(module.parameters(recurse=False))
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, LINEAR):
        return "linear"
    if _is_convolution(module):
        return "convolution"
    most = max(weight.ndim for weight in own)
    return "experts" if most >= 3 else "small" if most <= 1 else "other"


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
