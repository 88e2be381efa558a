"""Puts a LoRA adapter on a base, and says how many modules it touches."""

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapter.expert_lora import ExpertLora, Experts, attach_to_experts, short_names
from qlora_kit.adapter.expert_updates import BASE_LAYER
from qlora_kit.adapter.plain_peft import taken_for_experts
from qlora_kit.adapter.saved import PREFIX, WEIGHTS, split_parameters
from qlora_kit.core.errors import DamagedFileError, RecipeError, RunError
from qlora_kit.core.patterns import whole_or_end
from qlora_kit.core.quiet import no_banners
from qlora_kit.core.units import counted
from qlora_kit.schema.lora import TARGET_SETS, LoraConfig, LoraInit
from qlora_kit.weights.headers import read_header
from qlora_kit.weights.own_names import OwnNames, own_names_of

DEFAULT_ADAPTER = "default"  # peft's name for the one that is not named
_HOLDERS = {"attention": ("attn", "attention"), "mlp": ("mlp", "feed_forward")}
_FACTOR = re.compile(r"\.lora_(embedding_)?A(\.|$)")


@dataclass(frozen=True)
class AdapterSize:
    """What is trained."""

    modules: int
    parameters: int


def meant_names(
    model: torch.nn.Module, lora: LoraConfig, spared: Mapping[str, str], *, has_stacks: bool = False
) -> set[str]:
    """Full names of the linear modules that the recipe's targets mean; stacks of experts are none.

    Args:
        spared: linear modules that never carry LoRA, with the reason; an output head of the usual name never does.
        has_stacks: of experts, which `mlp` means too.
    Raises:
        RecipeError: a target names nothing in this base that could carry LoRA.
    """
    spared = {name: "the output head" for name in _linears(model) if name.rpartition(".")[2] == "lm_head"} | {**spared}
    linears = [name for name in _linears(model) if name not in spared]
    if not linears:
        raise RecipeError("this base has no linear module that LoRA could be put on", "model.source")
    found: set[str] = set()
    for target in lora.targets:
        meant = {name for name in linears if _is_meant(target, name)}
        if not meant and target == "mlp" and lora.adapts_experts and has_stacks:
            if len(lora.targets) > 1:
                continue
            raise RecipeError(
                "lora.targets names mlp, which is the experts alone in this base; peft's form of an adapter has no "
                "place for experts without a linear module beside them",
                "lora.targets",
                "lora.targets=[attention,mlp]",
            )
        if not meant:
            present = sorted({name.rpartition(".")[2] for name in linears})
            reason = next((why for name, why in spared.items() if _is_meant(target, name)), "")
            why_not = f"carries no LoRA: {reason}" if reason else "is no linear module of this base"
            raise RecipeError(
                f"lora.targets names {target}, which {why_not}; it has {', '.join(present)}",
                "lora.targets",
                "lora.targets=[all_linear]",
            )
        found |= meant
    return found


def _linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def exact_targets(adapted: Collection[str], modules: Collection[str]) -> tuple[list[str], list[str]]:
    """What peft's configuration says for exactly these modules: last parts of names, and full names to spare.

    Args:
        adapted: full names.
        modules: of every module of the model.
    """
    targets = {name.rpartition(".")[2] for name in adapted}
    spared = {name for name in modules if name.rpartition(".")[2] in targets and name not in adapted}
    return sorted(targets), sorted(spared)


def _is_meant(target: str, name: str) -> bool:
    """Whether a target means a module; `attention` and `mlp` are also what lies in a module of such a name."""
    *path, last = name.split(".")
    if target == "all_linear":
        return True
    if any(word in part for word in _HOLDERS.get(target, ()) for part in path):
        return True
    return last in TARGET_SETS.get(target, (target,))


def attach_lora(model: PreTrainedModel, lora: LoraConfig, spared: Mapping[str, str] | None = None) -> PeftModel:
    """Freeze the base and add trainable LoRA weights.

    Args:
        spared: linear modules that carry none whatever the targets say, with the reason: an output head, routers.
    """
    with no_banners(), warnings.catch_warnings():  # peft looks for layers of other libraries, which print
        _ignore_ties()
        has_stacks = any(isinstance(module, Experts) for module in model.modules())
        config = peft_config(model, lora, spared, has_stacks=has_stacks)
        with names_as_they_are(model, config):
            adapted = get_peft_model(model, config)
    if lora.adapts_experts:
        stacks = attach_to_experts(model, DEFAULT_ADAPTER, lambda name: _rank_and_alpha(name, config))
        config.target_parameters = short_names(stacks) or None
    return adapted


@contextmanager
def names_as_they_are(model: PreTrainedModel, config: PeftLoraConfig) -> Iterator[None]:
    """Keep peft from taking a target for the part of an expert of an older transformers.

    For some kinds of mixtures it would adapt the experts in place of the dense and the shared ones that have a
    gate_proj too (peft, `transformers_weight_conversion.py`); it goes by the model's kind, which is hidden meanwhile.
    """
    if not taken_for_experts(str(getattr(model.config, "model_type", "")), config):
        yield
        return
    fields = vars(model.config)  # of this model: the kind itself is an attribute of the class
    before = dict(fields)
    fields["model_type"] = ""
    try:
        yield
    finally:
        del fields["model_type"]
        if "model_type" in before:
            fields["model_type"] = before["model_type"]


def _rank_and_alpha(name: str, config: PeftLoraConfig) -> tuple[int, float]:
    """The rank of a stack of experts, and the alpha that gives it its scale, as peft finds them by its name."""
    rank = next((r for key, r in config.rank_pattern.items() if re.match(whole_or_end(key), name)), config.r)
    alphas = config.alpha_pattern.items()
    alpha = next((alpha for key, alpha in alphas if re.match(whole_or_end(key), name)), config.lora_alpha)
    return rank, alpha * math.sqrt(rank) if config.use_rslora else alpha


def peft_config(
    model: PreTrainedModel, lora: LoraConfig, spared: Mapping[str, str] | None = None, *, has_stacks: bool = False
) -> PeftLoraConfig:
    """peft's configuration of a recipe's `lora` for one base; spared and has_stacks as for `meant_names`.

    Raises:
        RecipeError: a target names nothing in this base.
    """
    meant = meant_names(model, lora, spared or {}, has_stacks=has_stacks)
    targets, others = exact_targets(meant, [name for name, _ in model.named_modules()])
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=others or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init is LoraInit.default else lora.init.value,
        modules_to_save=list(lora.modules_to_save) or None,
    )


def adapted_names(model: PeftModel) -> set[str]:
    """Full names, in the base, of the modules that carry LoRA.

    A parameter that peft adapts by itself, as one of fused experts, is named with its own name behind the module's.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    return {
        f"{name}.{module.parameter_name}".replace(BASE_LAYER, "")
        if isinstance(module, ParamWrapper | ExpertLora)
        else name
        for name, module in layers.items()
    }


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a trained adapter on a freshly loaded base.

    Raises:
        RunError: the adapter holds a module that this base has no place for, or lacks one.
        DamagedFileError: it has no safetensors file; peft would load a pickle in its place.
    """
    if not (folder / WEIGHTS).is_file():
        raise DamagedFileError(f"{folder} is no adapter: it has no {WEIGHTS}", str(folder))
    with no_banners(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below, as an error
        warnings.filterwarnings("ignore", ".*`base_model_name_or_path` was renamed")  # the run knows its base
        _ignore_ties()
        loaded = _loaded(model, folder)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    placed = {name for name, module in layers.items() if not isinstance(module, ExpertLora)}
    stacks = {name for name, module in layers.items() if isinstance(module, ExpertLora)}
    names = own_names_of(model)
    factors = (tensor.name for tensor in read_header(folder / WEIGHTS) if _FACTOR.search(tensor.name))
    modules = {_FACTOR.split(name)[0].removeprefix(PREFIX) for name in factors}
    held = {f"{PREFIX}{names.trained(name) or name}" for name in modules}
    held = (held & stacks) | {name.replace(BASE_LAYER, "") for name in held - stacks}
    placed |= stacks
    if odd := sorted(placed ^ held):
        some = counted(
            len(odd), "module of the adapter and of this base does", "modules of the adapter and of this base do"
        )
        what = f"{some} not match, such as {odd[0]}"
        raise RunError(f"{what}, so the adapter would not be used as it was trained", str(folder))
    return loaded


def _loaded(model: PreTrainedModel, folder: Path) -> PeftModel:
    config = PeftConfig.from_pretrained(folder)
    linears, named = split_parameters(config.target_parameters, config.r, read_header(folder / WEIGHTS))
    config.target_modules, names = {*(config.target_modules or ()), *linears}, own_names_of(model)
    if names.is_part and config.exclude_modules and not isinstance(config.exclude_modules, str):
        trained = [names.trained(name) for name in config.exclude_modules]
        config.exclude_modules = [name for name in trained if name is not None] or None
    config.target_parameters, config.inference_mode = None, True
    with names_as_they_are(model, config):
        loaded = get_peft_model(model, config)
    if named:
        attach_to_experts(model, DEFAULT_ADAPTER, lambda name: _rank_and_alpha(name, config))
        config.target_parameters = named
    with names_as_they_are(model, config):
        loaded.load_adapter(folder, DEFAULT_ADAPTER, is_trainable=False, key_mapping=_trained_for_own(names))
    return loaded


def _trained_for_own(names: OwnNames) -> dict[str, str] | None:
    """What peft is to rename in a saved adapter, as patterns at the begin of a name; None where nothing is."""
    if not names.begins:
        return None
    return {rf"^{re.escape(own)}\.": f"{begin}." if begin else "" for begin, own in names.begins.items()}


def _ignore_ties() -> None:
    """Leave out peft's warning of a head or embedding that is trained in full: the merge writes both apart."""
    warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")


def adapter_size(model: PeftModel) -> AdapterSize:
    """Count adapted modules and trainable weights."""
    modules = sum(isinstance(module, LoraLayer) for module in model.modules())
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return AdapterSize(modules, parameters)


def train_in_fp32(model: PeftModel) -> None:
    """Hold every trained weight in fp32, in place.

    TRL casts the adapter of a quantized base to bf16 when its trainer is built, and peft reloads it as fp32 from a
    checkpoint, so without this a resumed run would differ from an uninterrupted one.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
