"""What LoRA will reach of a base and what stays in 16 bit: told, or refused, before a weight is loaded."""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_kit.adapter.attach import adapted_names, attach_lora, meant_names
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import Problem, RecipeError, RunError
from qlora_kit.core.quiet import no_banners
from qlora_kit.engine.attention.packed import attends_at_once
from qlora_kit.engine.attention.sinks import has_flash_sinks
from qlora_kit.engine.attention.without_weights import no_packed_rows
from qlora_kit.engine.layer.layer_needs import LayerNeeds
from qlora_kit.engine.layer.without_weights import AsTrained, needs_of_layers
from qlora_kit.families.registry import FAMILIES
from qlora_kit.model.kind import kind_problems, read_config
from qlora_kit.model.language_model import build_language_model
from qlora_kit.model.load import check_storage, put_4bit_linears, quiet_libraries, rounded_names, torch_dtype
from qlora_kit.model.packed_loading import stack_experts
from qlora_kit.model.skeleton import attention_for, skeleton, told_plainly
from qlora_kit.model.stacked_experts import experts_of, stacked_names
from qlora_kit.model.stored_names import StoredNames, stored_names
from qlora_kit.model.structure import has_attention, layers_of, not_adapted, state_carriers, weights_of
from qlora_kit.model.unlike_config import UnlikeConfig
from qlora_kit.schema.data import Batching
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.lora import LoraConfig, LoraInit
from qlora_kit.schema.model import Attention
from qlora_kit.schema.quant import ComputeDtype
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.base_problems import ATTENTION_ONLY, base_problems, few, saved_twice, unmatched_patterns
from qlora_kit.training.reached import Reach
from qlora_kit.weights.headers import StoredTensor
from qlora_kit.weights.microscaled import read_weights
from qlora_kit.weights.own_names import OwnNames, own_names_of

USUAL_ROW = 2048  # tokens of a row, where the free memory decides


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, and where the weights of its model lie among them; none where only config.json is."""

    tensors: Mapping[str, StoredTensor]
    names: StoredNames

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a folder."""
        tensors = read_weights(folder) if any(folder.glob("*.safetensors")) else {}
        return cls(tensors, stored_names(folder, tensors))

    def by_trained(self, names: OwnNames) -> dict[str, StoredTensor]:
        """The tensors by the names that the trained model has for them."""
        found = {names.trained(own): self.tensors[stored] for own, stored in self.names.by_own.items()}
        return {name: tensor for name, tensor in found.items() if name is not None}

    @property
    def left_out(self) -> dict[str, int]:
        """Weights outside of the language model, by the module that holds them."""
        found: Counter[str] = Counter()
        for stored, part in self.names.outside.items():
            found[part] += math.prod(self.tensors[stored].shape)
        return dict(found)


def reach_of(recipe: TrainRecipe, folder: Path) -> Reach:
    """What a recipe's adapter will reach in the base of a folder.

    Raises:
        RecipeError: this base cannot be trained as the recipe says; with every reason that can be told.
        DamagedFileError: a file of the base is damaged.
    """
    quiet_libraries()
    config = read_config(folder)
    if problems := list(kind_problems(recipe.model.source, config)):
        raise RecipeError(problems)
    check_storage(folder, recipe.quant)
    model, checkpoint = skeleton(folder), Checkpoint.of(folder)
    attention: tuple[Problem, ...] = ()
    try:
        given = attention_for(model, recipe.model.attention)
    except RecipeError as error:
        attention, given = error.problems, recipe.model.attention
    if given is Attention.eager:  # the others take the memory of sdpa
        model.set_attn_implementation(given.value)
    if given is not recipe.model.attention and recipe.data.batching is Batching.packed and has_attention(model):
        what = (
            "packed rows need an attention that keeps samples apart, and transformers computes this model right with "
            "eager alone"
        )
        attention = (_not_packed(recipe, what),)
    elif not attention and recipe.data.batching is Batching.packed and given in (Attention.sdpa, Attention.eager):
        with torch.device("meta"):
            another = build_language_model(folder, given.value)
        attention = (_not_packed(recipe, what),) if (what := no_packed_rows(another, given)) else ()
    try:
        reach = _reach_in(recipe, folder, config, model, checkpoint)
    except RecipeError as error:
        needs_other_base = any(problem.where == "model.source" for problem in error.problems)
        if not attention or needs_other_base:  # which no other attention would help
            raise
        raise RecipeError([*attention, *error.problems]) from error
    if attention:
        raise RecipeError(attention)
    has_flash = recipe.engine.mode is EngineMode.fast and given is Attention.eager and has_flash_sinks(model)
    return replace(
        reach,
        attention=given,
        wanted_attention=recipe.model.attention,
        has_flash=has_flash,
        takes_one_row=given is Attention.sdpa and _takes_one_row(recipe, model),
    )


def _takes_one_row(recipe: TrainRecipe, model: PreTrainedModel) -> bool:
    """Whether the fast engine keeps the rows of a batch apart where they lie one after another, and by one kernel.

    Layers that carry a state from token to token would carry it from row to row.
    """
    if recipe.engine.mode is not EngineMode.fast or recipe.lora.dropout > 0 or state_carriers(model):
        return False
    is_known = model.config.get_text_config().model_type in FAMILIES
    return is_known and attends_at_once(model, torch_dtype(recipe.quant.compute_dtype))


def _not_packed(recipe: TrainRecipe, what: str) -> Problem:
    return Problem(what, f"data.batching={recipe.data.batching.name}", "data.batching=padded")


def _reach_in(
    recipe: TrainRecipe,
    folder: Path,
    config: Mapping[str, object],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
) -> Reach:
    weights, spared = weights_of(model), not_adapted(model)
    names = own_names_of(model)
    tensors = checkpoint.by_trained(names) if checkpoint.tensors else None
    stacks = [names.trained(stack) or "" for stack in checkpoint.names.stacks]
    rounded = rounded_names(model, recipe.quant)
    unlike = checkpoint.names.unlike if checkpoint.tensors else UnlikeConfig()
    of_towers = tuple(name for name in unlike.missing if names.trained(name) is None)
    of_model = replace(unlike, missing=tuple(name for name in unlike.missing if name not in of_towers))
    if problems := base_problems(recipe, model, weights, tensors, stacks, of_model):
        raise RecipeError(problems)
    promised = promised_names(model, recipe.lora, spared)
    experts = [part.name for part in weights if part.kind == "experts"]
    if problems := [*unmatched_patterns(recipe, promised), *saved_twice(recipe, promised, set(rounded), experts)]:
        raise RecipeError(problems)
    layers = layers_of(model)[1]
    with told_plainly(folder, config, "adapt"), no_banners(), warnings.catch_warnings(action="ignore"):
        put_4bit_linears(model)  # of which peft asks no other library
        stack_experts(model)
        adapted_model = attach_lora(model, _on_meta(recipe.lora), spared)
    _check_promise(adapted_names(adapted_model), promised)
    trained = sum(weight.numel() for weight in adapted_model.parameters() if weight.requires_grad)
    trained += sum(weight.numel() for name, weight in model.named_parameters() if _is_saved(name, recipe.lora))
    if recipe.lora.use_dora:  # a magnitude for each output row, which needs weights to be made
        trained += sum(part.shape[0] for part in weights if part.name in promised)
    wide = 4 if recipe.quant.compute_dtype is ComputeDtype.float32 else 2
    needs = _needs_of_layers(recipe, adapted_model, rounded)
    rounds, reaches, towers = frozenset(rounded), frozenset(promised), checkpoint.left_out
    return Reach(
        layers, weights, rounds, reaches, trained, wide, towers, needs, spared, lacking=of_towers, beyond=unlike.beyond
    )


def _needs_of_layers(recipe: TrainRecipe, model: PeftModel, rounded: Collection[str]) -> LayerNeeds | None:
    """What the layers need in a step; None where their sizes tell it, or where it cannot be found without values."""
    longest, data = recipe.data.max_tokens, recipe.data
    run = AsTrained(
        fast=recipe.engine.mode is EngineMode.fast,
        rounded=rounded,
        dtype=torch_dtype(recipe.quant.compute_dtype),
        is_packed=data.batching is Batching.packed,
        row_tokens=longest if isinstance(longest, int) else USUAL_ROW,
    )
    try:
        return needs_of_layers(model, run)
    except Exception as error:  # code of a model that asks for values: an estimate from sizes is no reason not to train
        log.debug(f"layers could not be run without values: {type(error).__name__}: {error}")
        log.info("memory: what layers need is estimated from their sizes, as these do not run without values")
        return None


def check_reached(model: PeftModel, reach: Reach) -> None:
    """Compare a loaded and adapted base with what was promised.

    Raises:
        RunError: another set of modules carries LoRA.
    """
    adapted = adapted_names(model)
    if adapted != reach.adapted:
        differ = sorted(adapted ^ reach.adapted)
        raise RunError(f"LoRA is on {len(adapted)} modules, not on the {len(reach.adapted)} promised: {few(differ)}")


def _on_meta(lora: LoraConfig) -> LoraConfig:
    """The same modules, with values that need no weights to start from, and without copies of weights."""
    return replace(lora, init=LoraInit.default, use_dora=False, modules_to_save=[])


def _is_saved(parameter: str, lora: LoraConfig) -> bool:
    """Whether a parameter belongs to a module that is trained in full, as peft matches it: by the end of its name."""
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(module.endswith(name) for module in modules for name in lora.modules_to_save)


def promised_names(model: PreTrainedModel, lora: LoraConfig, spared: Mapping[str, str]) -> set[str]:
    """Full names of the linear modules, and of the stacks of experts, that a recipe's targets mean.

    Args:
        spared: linear modules that never carry LoRA, with the reason.
    Raises:
        RecipeError: a target names nothing in this base.
    """
    stacks = experts_of(model).items() if lora.adapts_experts else ()
    of_experts = {f"{name}.{stack}" for name, module in stacks for stack in stacked_names(module)}
    return meant_names(model, lora, spared, has_stacks=bool(of_experts)) | of_experts


def _check_promise(adapted: set[str], promised: set[str]) -> None:
    if adapted == promised:
        return
    missing, extra = sorted(promised - adapted), sorted(adapted - promised)
    what = f"peft would leave out {len(missing)} of the {len(promised)} linear modules that lora.targets means"
    if missing:
        what += f" ({few(missing)})"
    if extra:
        what += f", and adapt {few(extra)} instead, which no export could merge"
    raise RecipeError(what, "lora.targets", ATTENTION_ONLY)
