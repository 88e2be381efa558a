"""A model's linear layers, experts one by one, under the names that its folder has for them; no weight is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.weights.headers import StoredTensor, read_headers
from qlora_kit.weights.own_names import own_names_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qlora_kit.model.expert_layout import StackLayout
    from qlora_kit.model.stored_names import StoredNames
    from qlora_kit.model.unfused_experts import ExpertsForm

_WEIGHT, _BIAS, DOWN = ".weight", ".bias", "down_proj"


@dataclass(frozen=True)
class ExpertPart:
    """Where a matrix lies in a parameter that holds all experts of a layer."""

    form: "ExpertsForm"
    number: int
    matrix: str
    is_flipped: bool

    def of(self, stored: "Tensor") -> "Tensor":
        """The matrix [out_features, in_features]; `is_flipped` says that the file has rows for the model's columns."""
        whole = stored.transpose(1, 2) if self.is_flipped else stored
        return self.form.matrix(whole, self.number, self.matrix)


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer inside a model's blocks.

    Attributes:
        module: its name in the model, with experts taken apart.
        name: in front of its tensors in a quantized folder.
        shape: (out_features, in_features).
        weight: the tensor of the folder that holds it.
        part: where in this tensor, if it holds all experts of a layer.
    """

    module: str
    name: str
    shape: tuple[int, int]
    weight: str
    part: ExpertPart | None = None

    @property
    def is_expert(self) -> bool:
        """Whether it is a matrix of one expert."""
        return self.part is not None or self.module.rsplit(".", 2)[1].isdecimal()

    @property
    def bias(self) -> str:
        """The tensor of the folder that holds its bias, where it has one."""
        return f"{self.weight}_bias" if self.part else self.weight.removesuffix(_WEIGHT) + _BIAS

    def matrix(self, stored: "Tensor") -> "Tensor":
        """Its weight [out_features, in_features], out of the tensor that holds it."""
        return self.part.of(stored) if self.part else stored

    def bias_of(self, stored: "Tensor") -> "Tensor":
        """Its bias [out_features], out of the tensor that holds those of all experts."""
        if self.part is None:
            return stored
        return self.part.form.rows(stored[self.part.number], self.part.matrix).contiguous()


@dataclass(frozen=True)
class StoredLinears:
    """What a layer-by-layer quantizer finds inside a model's blocks.

    Attributes:
        linears: layers that can be quantized one by one.
        otherwise: names in the model of layers and experts that the folder holds in a way of its own.
        kept: names in the folder of other layers, which stay in 16 bit: what chooses among experts, and what lies
            outside of the blocks, but for the output head.
        filled_in: names in the folder of layers whose weight transformers fills in by that name before it loads them.
        towers: last parts of the names of what is no part of the language model.
        tower_modules: its whole names, in the checkpoint's own class.
        splits_gate: whether gate and up of experts are two layers, by the name of the experts' module in the model.
        names: the folder's name of every parameter that it holds as it is, by the model's.
    """

    linears: tuple[StoredLinear, ...]
    otherwise: tuple[str, ...]
    kept: tuple[str, ...]
    filled_in: tuple[str, ...]
    towers: tuple[str, ...]
    tower_modules: tuple[str, ...]
    splits_gate: Mapping[str, bool]
    names: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by name."""
        return {linear.name: linear.shape for linear in self.linears}

    def inside(self, layer: str) -> dict[str, StoredLinear]:
        """Those inside one layer of the model, by their name within it."""
        begin = f"{layer}."
        return {one.module.removeprefix(begin): one for one in self.linears if one.module.startswith(begin)}


def stored_linears(model: "PreTrainedModel", stored: "StoredNames") -> StoredLinears:
    """Those of a folder's language model, whose weights may be on the meta device.

    Args:
        stored: where its weights lie in the folder.
    """
    from torch import nn

    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.model.direct_reads import initialized_directly
    from qlora_kit.model.structure import router_names, weights_of
    from qlora_kit.model.unfused_experts import fused_experts

    own = own_names_of(model)
    prefix, layers = decoder_layers(model)
    routers = router_names(model)
    found: list[StoredLinear] = []
    otherwise: list[str] = []
    for name, module in layers.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear) and name not in routers:
            weight = stored.by_own.get(own.own(f"{name}{_WEIGHT}"), "")
            shape = (module.out_features, module.in_features)
            if weight.endswith(_WEIGHT):
                found.append(StoredLinear(name, weight.removesuffix(_WEIGHT), shape, weight))
            else:
                otherwise.append(name)
    splits_gate = {}
    for name, module, form in fused_experts(layers, prefix):
        holds = [_tensors(stored.stacks.get(own.own(f"{name}.{matrix}")), form.count) for matrix in (form.first, DOWN)]
        splits_gate[name] = form.is_gated and {len(one) for one in holds[0].apart} != {1}
        experts = list(_experts(name, module, form, splits_gate[name], holds))
        found += experts
        otherwise += [] if experts else [name]
    kinds = [one for one in weights_of(model) if one.name.startswith(prefix)]
    otherwise += [one.name for one in kinds if one.kind == "experts" and one.name not in splits_gate]
    kept = [*(one.name for one in kinds if one.kind == "router"), *_linears_outside(model, prefix)]
    kept_weights = (stored.by_own.get(own.own(f"{name}{_WEIGHT}"), "") for name in kept)
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    filled_in = set(initialized_directly(model))
    return StoredLinears(
        linears=tuple(found),
        otherwise=tuple(otherwise),
        kept=tuple(name.removesuffix(_WEIGHT) for name in kept_weights if name),
        filled_in=tuple(one.name for one in found if one.module in filled_in),
        towers=tuple(sorted({module.rpartition(".")[2] for module in stored.outside.values()})),
        tower_modules=tuple(sorted(set(stored.outside.values()))),
        splits_gate=splits_gate,
        names={name: stored.by_own[own.own(name)] for name in names if own.own(name) in stored.by_own},
    )


def _linears_outside(model: "PreTrainedModel", prefix: str) -> "Iterator[str]":
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not name.startswith(f"{prefix}."):
            yield name


def replaced_apart(
    linears: Iterable[StoredLinear], packed: "Callable[[StoredLinear, Tensor], dict[str, Tensor] | None]"
) -> "dict[str, Callable[[Tensor], dict[str, Tensor]]]":
    """What makes the tensors that stand in a folder's tensors' place, one at a time, as `rewrite_checkpoint` takes it.

    Args:
        packed: a layer's tensors by kind, of its weight [out_features, in_features]; None where it stays in 16 bit.
    """
    by_tensor: dict[str, list[StoredLinear]] = {}
    biases: dict[str, list[StoredLinear]] = {}
    for linear in linears:
        by_tensor.setdefault(linear.weight, []).append(linear)
        if linear.part is not None and linear.part.form.has_bias:
            biases.setdefault(linear.bias, []).append(linear)

    def weights(inside: list[StoredLinear], stored: "Tensor") -> "dict[str, Tensor]":
        made: dict[str, Tensor] = {}
        for linear in inside:
            tensors = packed(linear, linear.matrix(stored)) or {"weight": linear.matrix(stored).contiguous()}
            made |= {f"{linear.name}.{kind}": tensor for kind, tensor in tensors.items()}
        return made

    def of_biases(inside: list[StoredLinear], stored: "Tensor") -> "dict[str, Tensor]":
        return {f"{linear.name}.bias": linear.bias_of(stored) for linear in inside}

    return {
        **{name: partial(weights, inside) for name, inside in by_tensor.items()},
        **{name: partial(of_biases, inside) for name, inside in biases.items()},
    }


def folder_linears(folder: Path) -> StoredLinears:
    """Those of a model folder, which is not loaded.

    Raises:
        RecipeError: transformers cannot build the model.
    """
    from qlora_kit.model.skeleton import skeleton
    from qlora_kit.model.stored_names import stored_names

    return stored_linears(skeleton(folder), stored_names(folder, headers_or_own(folder)))


def headers_or_own(folder: Path) -> Mapping[str, StoredTensor]:
    """Of a folder's tensors; where it holds none, those that its model would have."""
    from qlora_kit.model.language_model import language_model

    if any(folder.glob("*.safetensors")):
        return read_headers(folder)
    weights = language_model(folder).own.named_parameters(remove_duplicate=False)
    return {name: StoredTensor(name, folder, 0, "BF16", tuple(weight.shape)) for name, weight in weights}


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer inside a model's blocks, by its name in the folder."""
    return folder_linears(folder).shapes


@dataclass(frozen=True)
class _Holding:
    """The tensors of a stack of experts: one that holds all, or those of each in the order of their rows."""

    whole: str = ""
    is_flipped: bool = False
    apart: tuple[tuple[str, ...], ...] = ()


def _tensors(layout: "StackLayout | None", count: int) -> _Holding:
    if layout is None:
        return _Holding()
    if len(layout.parts) == 1 and layout.parts[0].expert is None:
        return _Holding(layout.parts[0].tensor, layout.parts[0].flipped)
    by_expert: dict[int, list[tuple[int, str]]] = {}
    for part in layout.parts:
        if part.expert is None:
            return _Holding()
        by_expert.setdefault(part.expert, []).append((part.first, part.tensor))
    apart = tuple(tuple(name for _, name in sorted(by_expert[number])) for number in sorted(by_expert))
    return _Holding(apart=apart if len(apart) == count else ())


def _experts(
    name: str, module: "nn.Module", form: "ExpertsForm", splits_gate: bool, holds: Sequence[_Holding]
) -> "Iterator[StoredLinear]":
    """The layers of a module of experts; none where the folder holds them in a way of its own."""
    first, down = holds
    matrices = form.matrices(splits_gate=splits_gate)
    shapes = form.shapes(module, splits_gate=splits_gate)
    if first.whole and down.whole:
        # Readers know experts that lie apart by the names of their matrices.
        owner = first.whole.removesuffix(f".{form.first}")
        owner = name if owner == first.whole else owner
        for number in range(form.count):
            for matrix in matrices:
                place = down if matrix == DOWN else first
                part = ExpertPart(form, number, matrix, place.is_flipped)
                layer = f"{number}.{matrix}"
                yield StoredLinear(f"{name}.{layer}", f"{owner}.{layer}", shapes[matrix], place.whole, part)
    elif first.apart and down.apart and not form.has_bias and len(first.apart[0]) + 1 == len(matrices):
        for number in range(form.count):
            for matrix, weight in zip(matrices, (*first.apart[number], *down.apart[number]), strict=True):
                yield StoredLinear(f"{name}.{number}.{matrix}", weight.removesuffix(_WEIGHT), shapes[matrix], weight)
