"""Puts the fast engine into a model's decoder layers, and takes it out again.

Modules, parameters and their names stay as they are: each layer instance gets another `forward`, which is used while
training. Without gradients, in eval mode and with a cache the layer's own forward runs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kit.core.units import counted
from qlora_kit.engine.graphs.host_memory import SavedOnHost
from qlora_kit.engine.graphs.layer_graphs import CapturableLayer, LayerGraphs
from qlora_kit.engine.layer.attention_part import inputs_of
from qlora_kit.engine.layer.checkpoint_policy import CheckpointPolicy
from qlora_kit.engine.layer.experts import speed_up_experts
from qlora_kit.engine.layer.extract import extract_parts
from qlora_kit.engine.layer.layer_parts import LayerParts
from qlora_kit.engine.layer.trial import largest_difference
from qlora_kit.engine.linear.fp8 import weight_for
from qlora_kit.engine.linear.frozen_weight import FrozenWeight, NotFastError
from qlora_kit.engine.linear.linear_group import LinearGroup, cast_adapters
from qlora_kit.families.family import Family
from qlora_kit.families.registry import FAMILIES
from qlora_kit.schema.engine import EngineConfig

KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"}


class MakeFrozen(Protocol):
    """Makes the frozen weight of a linear module."""

    def __call__(self, name: str, linear: torch.nn.Module, *, dtype: torch.dtype) -> FrozenWeight:
        """The weight of the module called `name` in its layer, for products in `dtype`; `NotFastError` if none fits."""
        ...


class FastLayer:
    """The `forward` of one decoder layer.

    Attributes:
        parts: of the layer; None where it runs as transformers and peft have it, and only recomputation is ours.
        policy: a `CheckpointPolicy`.
        graphs: of all layers that are recorded; None where every kernel of this one is started by itself.
        place: among the layers that have graphs.
        begin: what is to be done before a forward pass; None but for the first layer.
    """

    def __init__(self, layer: Any, parts: LayerParts | None, dtype: torch.dtype) -> None:
        self.layer = layer
        self._inputs = list(inputs_of(layer))[1:]  # behind hidden states
        self._others = {*self._inputs} - KNOWN_INPUTS
        self._instance_forward = vars(layer).get("forward")
        self.plain: Callable[..., Any] = layer.forward
        self.parts = parts
        self.dtype = dtype
        self.policy: int = CheckpointPolicy.keep_all
        self.met_a_cache = False
        self.graphs: LayerGraphs | None = None
        self.place = 0
        self.begin: Callable[[], None] | None = None

    def __call__(self, hidden_states: Tensor, *rest: Any, **settings: Any) -> Any:
        """The next hidden states `[rows, tokens, hidden]`, as the layer's own forward returns them."""
        if not self.layer.training or not torch.is_grad_enabled():
            if self.graphs is not None and self.place == 0:
                self.graphs.release()
            return self.plain(hidden_states, *rest, **settings)
        settings |= dict(zip(self._inputs, rest, strict=False))
        if settings.get("past_key_values") is not None:
            self.met_a_cache = True
            return self.plain(hidden_states, **settings)
        if self.begin is not None:
            self.begin()
        parts = self.parts
        if parts is None or not self._is_as_read(parts, settings):
            return self._checkpointed(self.plain, hidden_states, settings)
        settings = {name: given for name, given in settings.items() if name not in parts.ignores}
        graphs = self.graphs
        whole = parts.is_by_hand or (parts.records_whole and graphs is not None and not graphs.in_part)
        if graphs is None or self._has_dropout() or not (whole or parts.records_attention):
            return self._fast(hidden_states, settings)
        on_host = self.policy >= CheckpointPolicy.offload_input
        if whole:
            layer = CapturableLayer(self._fast, parts.trained, parts.set_grad_targets, not parts.is_by_hand)
            layer = layer._replace(from_host=partial(self._fast, stays=True) if on_host else None)
            return graphs.run(self.place, layer, hidden_states, settings)
        trained = [part for linear in parts.linears for part in (linear.a, linear.b) if part is not None]
        layer = CapturableLayer(self._attention, trained, parts.set_grad_targets)
        layer = layer._replace(from_host=partial(self._attention, stays=True) if on_host else None)
        between = graphs.run(self.place, layer, hidden_states, settings)
        return self._checkpointed(partial(parts.forward_mlp, policy=self.policy), between, {})

    @property
    def weights(self) -> list[FrozenWeight]:
        """Of the linear modules that are computed by hand."""
        return [] if self.parts is None else [linear.weight for linear in self.parts.linears]

    def compute(self, hidden_states: Tensor, rest: Sequence[Any], settings: Mapping[str, Any]) -> Tensor | None:
        """See `trial.TriedLayer`."""
        settings = {**settings, **dict(zip(self._inputs, rest, strict=False))}
        if self.parts is None or not self._is_as_read(self.parts, settings):
            return None
        return self.parts.forward(hidden_states.to(self.dtype), settings, CheckpointPolicy.keep_all)

    def _fast(self, hidden_states: Tensor, settings: Mapping[str, Any], *, stays: bool = False) -> Tensor:
        found: Tensor = self._checkpointed(self._by_hand, hidden_states.to(self.dtype), settings, stays=stays)
        return found

    def _attention(self, hidden_states: Tensor, settings: Mapping[str, Any], *, stays: bool = False) -> Tensor:
        assert self.parts is not None
        run = partial(self.parts.forward_attention, settings=settings)
        found: Tensor = self._checkpointed(run, hidden_states.to(self.dtype), {}, stays=stays)
        return found

    def _is_as_read(self, parts: LayerParts, settings: Mapping[str, Any]) -> bool:
        """Whether adapters are as they were, and the layer is given nothing that its family's layers do not take."""
        known = parts.takes | parts.ignores
        unknown = (name for name in self._others if settings.get(name) is not None and name not in known)
        return all(linear.is_as_made() for linear in parts.linears) and not any(unknown)

    def _checkpointed(
        self, run: Callable[..., Any], hidden_states: Tensor, settings: Mapping[str, Any], *, stays: bool = False
    ) -> Any:
        """The layer's result, of which less is kept than its backward needs, if its policy says so.

        Args:
            stays: nothing is brought to the host here.
        """
        keeps_all = self.policy == CheckpointPolicy.keep_all
        if keeps_all or (self.parts is not None and self.policy < CheckpointPolicy.recompute_layer):
            return run(hidden_states, **settings)
        to_host = self.policy >= CheckpointPolicy.offload_input and not stays
        # What checkpoint keeps is its tensor argument: the rest, such as rope's angles, is shared by all layers.
        with SavedOnHost() if to_host else nullcontext():
            return checkpoint(
                partial(run, **settings), hidden_states, use_reentrant=False, preserve_rng_state=self._has_dropout()
            )

    def _has_dropout(self) -> bool:
        """Whether a training step draws random numbers in this layer."""
        return self.parts is None or self.parts.draws_random

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """Linear modules by their input; none where the layer runs plain."""
        return () if self.parts is None else self.parts.groups

    def install(self) -> None:
        """Become the layer's forward."""
        self.layer.forward = self

    def restore(self) -> None:
        """Leave the layer as it was."""
        if self._instance_forward is None:
            vars(self.layer).pop("forward", None)
        else:
            self.layer.forward = self._instance_forward

    def _by_hand(self, h: Tensor, **settings: Any) -> Tensor:
        assert self.parts is not None
        return self.parts.forward(h, settings, self.policy)


class FastEngine:
    """What `patch_model` did to a model.

    Attributes:
        messages: lines for the user: what runs plain, and why.
        layers: decoder layers that have another forward now; none where nothing could be sped up.
        graphs: of the layers; None without a GPU, or where the recipe wants none.
    """

    def __init__(
        self,
        layers: list[FastLayer],
        messages: list[str],
        undo_experts: Callable[[], None],
        graphs: LayerGraphs | None = None,
    ) -> None:
        """Args: undo_experts: takes the fast operations away from experts."""
        self.layers = layers
        self.messages = messages
        self.graphs = graphs
        self._undo_experts = undo_experts
        self._tell_places()
        self._groups = [(layer.dtype, group) for layer in layers for group in layer.groups]
        for _, group in self._groups:
            group.is_cast_with_others = True
        if layers:
            layers[0].begin = self.cast_adapters

    @property
    def fast_layers(self) -> int:
        """Layers that are computed by hand, at least in part."""
        return sum(layer.parts is not None for layer in self.layers)

    @property
    def keeps_as_told(self) -> bool:
        """Whether the layers' sizes tell what they keep for their backward pass."""
        return all(layer.parts is None or layer.parts.keeps_as_told for layer in self.layers)

    @property
    def met_a_cache(self) -> bool:
        """Whether a training step came with a cache, which makes every layer run plain: set `use_cache=False`."""
        return any(layer.met_a_cache for layer in self.layers)

    def set_policies(self, policies: Sequence[int]) -> None:
        """What each layer computes again from the next step on: one `CheckpointPolicy` for each layer in order.

        Raises:
            ValueError: there are more or fewer policies than layers.
        """
        if len(policies) != len(self.layers):
            raise ValueError(f"{len(policies)} policies for {len(self.layers)} layers")
        self._release()
        for layer, policy in zip(self.layers, policies, strict=True):
            layer.policy = policy
        self._tell_places()

    def keep_copies(self, room: float) -> int:
        """Keep weights in the format that they are multiplied in as well, as many as fit into so many bytes.

        Returns:
            The bytes taken.
        """
        self._release()
        taken = 0
        for _, group in self._groups:
            if 0 < group.copies_bytes <= room - taken:
                taken += group.copies_bytes
                group.keep_copies()
        return taken

    def cast_adapters(self) -> None:
        """Bring adapters, as they are now, into the format of activations."""
        for dtype in {dtype for dtype, _ in self._groups}:
            cast_adapters([group for other, group in self._groups if other is dtype], dtype)

    def undo(self) -> None:
        """Give every layer its own forward back."""
        self._release()
        self._undo_experts()
        for layer in self.layers:
            layer.restore()
        self.layers, self._groups = [], []

    def _tell_places(self) -> None:
        """Number the layers that are recorded: all but those that run plain, or whose MLP takes pieces."""
        place = 0
        for layer in self.layers:
            records = layer.policy < CheckpointPolicy.chunked_mlp and layer.parts is not None and layer.parts.records
            layer.graphs, layer.place = self.graphs if records else None, place
            place += records
        if self.graphs is not None:
            self.graphs.records_all = place == len(self.layers)

    def _release(self) -> None:
        if self.graphs is not None:
            self.graphs.release()


def patch_model(
    model: PeftModel,
    config: EngineConfig,
    policies: Sequence[int] | None = None,
    make_weight: MakeFrozen | None = None,
    *,
    is_tried: bool = True,
) -> FastEngine:
    """Make the decoder layers of a model run by hand while it trains.

    A part of a layer that holds what the engine does not know stays plain, or the whole layer where its family does not
    tell what is around its parts; so does a whole model of an unknown family.

    Args:
        policies: see `FastEngine.set_policies`; without, everything is kept. Unused where no layer is fast.
        make_weight: instead of the weights that `config.compute` asks for.
        is_tried: every layer is held against its own forward first; there are no numbers without weights.
    Raises:
        RecipeError: `config.compute` is fp8, and this machine or this model has no fp8.
        ValueError: `policies` does not fit the model.
    """
    base: Any = model.get_base_model()
    kind = base.config.get_text_config().model_type
    family = FAMILIES.get(kind)
    if family is None:
        messages = [f"engine.mode=fast has no {kind} layers: they run plain, on transformers and peft"]
        return FastEngine([], messages, speed_up_experts(base))
    layers, messages = _read_layers(base, family, make_weight or partial(weight_for, compute=config.compute))
    if is_tried and layers:
        worst, difference = largest_difference(base.base_model, layers)
        if difference > 1:
            layers = []
            messages.append(
                f"engine.mode=fast gives other numbers for layer {worst} than the layer itself, "
                f"{difference:.1f} times what is let through: all layers run plain; please report this"
            )
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    graphs = LayerGraphs() if config.cuda_graphs and on_gpu else None
    engine = FastEngine(layers, messages, speed_up_experts(base), graphs)
    if policies is not None and layers:
        engine.set_policies(policies)
    for fast in layers:
        fast.install()
    return engine


def _read_layers(model: torch.nn.Module, family: Family, make_weight: MakeFrozen) -> tuple[list[FastLayer], list[str]]:
    """A model's decoder layers, or none where all of them run plain; and lines on what runs plain, and why."""
    found, reasons, of_parts = [], Counter[str](), Counter[tuple[str, str]]()
    for layer in (module for module in model.modules() if type(module).__name__ == family.layer):
        dtype = _compute_dtype(layer)
        parts: LayerParts | None = None
        try:
            parts = extract_parts(layer, family, partial(make_weight, dtype=dtype))
            of_parts.update(parts.plain_because)
        except (NotFastError, AttributeError) as reason:
            reasons[str(reason)] += 1
        found.append(FastLayer(layer, parts, dtype))
    messages = [
        f"{count} of {counted(len(found), 'layer runs', 'layers run')} plain, because {why}"
        for why, count in reasons.items()
    ]
    messages += [
        f"{part} of {count} of {counted(len(found), 'layer')} runs plain, because {why}"
        for (part, why), count in of_parts.items()
    ]
    return ([] if sum(reasons.values()) == len(found) else found), messages


def _compute_dtype(layer: torch.nn.Module) -> torch.dtype:
    """The dtype of the layer's products with frozen weights, and of its activations."""
    linears = [one for one in layer.modules() if isinstance(one, torch.nn.Linear) and not one.weight.requires_grad]
    asked = (getattr(linear, "compute_dtype", None) for linear in linears)
    dtype: torch.dtype = next((kind for kind in asked if kind is not None), linears[0].weight.dtype)
    return dtype
