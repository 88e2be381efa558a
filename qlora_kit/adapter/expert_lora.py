"""LoRA on stacks of experts: two factors an expert, in the tensors that peft and vLLM name for them.

peft's own way (`target_parameters`) adds the product of the factors to every expert's weight, which takes the memory of
a layer's experts in 16 bit for each forward pass and does not know weights in 4 bit. Here the rows of an expert go
through its factors. The saved tensors are the same: A [rank * experts, inputs], B [outputs, rank * experts], of the
first stack under `base_layer`, of the second above it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@runtime_checkable
class Experts(Protocol):
    """A module of experts that takes updates of its stacks."""

    stacks: Mapping[str, tuple[int, ...]]

    @property
    def experts(self) -> int:
        """How many there are."""
        ...

    def widths(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of an expert's matrix."""
        ...


class ExpertLora(nn.Module, LoraLayer):  # type: ignore[misc]  # peft is not typed
    """LoRA on one stack of the experts below; the next one wraps this one.

    Attributes:
        parameter_name: of the stack.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    base_layer: nn.Module
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    lora_A: nn.ModuleDict  # noqa: N815  # as peft names it
    lora_B: nn.ModuleDict  # noqa: N815
    disable_adapters: bool
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, rank: int, alpha: float) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.parameter_name = parameter_name
        experts = _experts_below(base_layer)
        self._experts, (inputs, outputs) = experts.experts, experts.widths(parameter_name)
        where = next(base_layer.parameters()).device
        self.r[adapter_name], self.lora_alpha[adapter_name] = rank, alpha
        self.lora_A[adapter_name] = nn.Linear(inputs, rank * self._experts, bias=False, device=where)
        self.lora_B[adapter_name] = nn.Linear(rank * self._experts, outputs, bias=False, device=where)
        nn.init.zeros_(self._factor(self.lora_B, adapter_name))
        self.scaling[adapter_name] = alpha / rank
        self.use_rslora[adapter_name] = False
        LoraLayer.set_adapter(self, [adapter_name])

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:  # noqa: ARG002  # of each stack its own
        return None, None

    def forward(self, hidden: Tensor, *arguments: Any, updates: Mapping[str, Any] | None = None) -> Any:
        """What the experts below give, with this update among theirs."""
        if self.disable_adapters:
            return self.base_layer(hidden, *arguments, updates=updates)
        (name,) = self.active_adapters  # the kit trains and reads one
        return self.base_layer(hidden, *arguments, updates={self.parameter_name: self.update(name), **(updates or {})})

    def update(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """A [experts, rank, inputs], B [experts, outputs, rank], and the scale of their product."""
        a, b = self._factor(self.lora_A, adapter_name), self._factor(self.lora_B, adapter_name)
        return (
            a.view(self._experts, -1, a.shape[1]),
            b.view(b.shape[0], -1, self._experts).permute(2, 0, 1),
            self.scaling[adapter_name],
        )

    @staticmethod
    def _factor(factors: nn.ModuleDict, adapter_name: str) -> Tensor:
        return factors[adapter_name].get_parameter("weight")


def attach_to_experts(model: nn.Module, adapter_name: str, ranks: Callable[[str], tuple[int, float]]) -> list[str]:
    """Put LoRA on every stack of experts of a model, in place.

    Args:
        ranks: gives rank and alpha for the full name of a stack.
    Returns:
        full names of the stacks.
    """
    attached = []
    found = {name: one for name, one in model.named_modules() if isinstance(one, Experts)}
    for name, experts in found.items():
        wrapped = model.get_submodule(name)
        for stack in experts.stacks:
            rank, alpha = ranks(f"{name}.{stack}")
            wrapped = ExpertLora(wrapped, adapter_name, stack, rank, alpha)
            attached.append(f"{name}.{stack}")
        model.set_submodule(name, wrapped)
    return attached


def short_names(stacks: Iterable[str]) -> list[str]:
    """The ends of the names of stacks from behind the layer's number on, as peft matches them, sorted."""
    return sorted({_behind_number(name) for name in stacks})


def _behind_number(name: str) -> str:
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _experts_below(module: nn.Module) -> Experts:
    below: object = module
    while isinstance(below, ExpertLora):
        below = below.base_layer
    assert isinstance(below, Experts)  # the caller's condition
    return below
