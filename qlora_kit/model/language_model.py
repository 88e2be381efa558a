"""The language model of a folder: which class of transformers it is, how it is built, and how its weights are read.

A checkpoint that takes images or sound holds a language model beside towers. Where transformers has a class for that
language model alone, it is the one that is trained, and no weight of a tower is read; else the checkpoint's own class
is, without its towers.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.core.errors import DamagedFileError, Problem, RecipeError
from qlora_kit.core.terminal import printable
from qlora_kit.core.units import counted
from qlora_kit.model.conversion import own_name_of_stored
from qlora_kit.model.kind import CONFIG
from qlora_kit.model.microscaled import is_microscaled, unpacks
from qlora_kit.model.unfused_experts import joined_experts
from qlora_kit.schema.model import Attention
from qlora_kit.weights.headers import read_headers
from qlora_kit.weights.own_names import SAME, OwnNames, note_own_names

_OWN_CLASSES: tuple[Any, ...] = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
_ANY_WIDTH = 64
_NOT_CONVERTED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")  # of a quantization_config


@dataclass(frozen=True)
class LanguageModel:
    """What is built for a folder.

    Attributes:
        auto: transformers' way to the class.
        config: of the class.
        names: of its weights, and of the same weights in the checkpoint's own class.
        own: the checkpoint's own class with its weights on the meta device.
    """

    auto: Any
    config: PreTrainedConfig
    names: OwnNames
    own: PreTrainedModel


def language_model(folder: Path) -> LanguageModel:
    """Find the class of a folder's language model; found once, until its config.json changes.

    Raises:
        RecipeError: transformers has none.
    """
    file = folder / CONFIG
    found = _found(folder, file.read_bytes() if file.is_file() else b"")
    return replace(found, config=deepcopy(found.config))  # which transformers and this module write into


@lru_cache(maxsize=4)
def _found(folder: Path, _config: bytes) -> LanguageModel:
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    classes = reversed(_OWN_CLASSES) if text is config else _OWN_CLASSES
    own_class = next((auto for auto in classes if type(config) in auto._model_mapping), None)
    if own_class is None:
        raise RecipeError([Problem(_no_language_model(folder, config), "model.source")])
    with torch.device("meta"):
        own = _own_model(own_class, config)
        if text is config:
            return LanguageModel(own_class, config, SAME, own)
        if type(text) in AutoModelForCausalLM._model_mapping:
            _take_over(config, text)
            begins = _begins(AutoModelForCausalLM.from_config(text, trust_remote_code=False), own)
            if begins is not None:
                names = OwnNames(begins, tuple(_outside(own, begins.values())))
                return LanguageModel(AutoModelForCausalLM, _with_names_of(text, names), names, own)
    names = OwnNames({}, tuple(_outside(own, _language_parts(own))))
    return LanguageModel(own_class, config, names, own)


def _own_model(own_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint's own class, with another tower in the place of one whose library is not installed.

    Towers are only looked at to be left out, so what is in them does not count.
    """
    try:
        model: PreTrainedModel = own_class.from_config(config, trust_remote_code=False)
    except ImportError:
        seen = deepcopy(config)
        towers = [(name, getattr(seen, name, None)) for name in seen.sub_configs]
        for name, tower in towers:
            if isinstance(tower, PreTrainedConfig) and not _can_be_built(tower):
                vars(seen)[name] = _stand_in(tower)  # past the check of its type
        model = own_class.from_config(seen, trust_remote_code=False)
    return model


def _stand_in(tower: PreTrainedConfig) -> PreTrainedConfig:
    """A tower that transformers can build, with whatever else the settings of another say to those around it."""
    found = SiglipVisionConfig(hidden_size=getattr(tower, "hidden_size", _ANY_WIDTH), num_attention_heads=1)
    vars(found).update({key: value for key, value in vars(tower).items() if not hasattr(found, key)})
    return found


def _can_be_built(config: PreTrainedConfig) -> bool:
    try:
        AutoModel.from_config(config, trust_remote_code=False)
    except ImportError:
        return False
    except ValueError:  # a part without a class of its own
        return True
    return True


def build_language_model(folder: Path, attention: str | None = None) -> PreTrainedModel:
    """Build a folder's language model with the weights that the surrounding device context gives, none read.

    Raises:
        RecipeError: transformers has no such class.
    """
    found = language_model(folder)
    model = found.auto.from_config(found.config, attn_implementation=attention, trust_remote_code=False)
    return as_language_model(model, found)


def load_language_model(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str | None = None,
    quantization: QuantizationConfigMixin | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a folder's language model; weights of towers are not read, or not kept.

    Args:
        dtype: of weights that are not quantized; "auto" for the checkpoint's.
        device: where all weights go; None for the CPU.
        quantization: how weights are quantized; None for the folder's own way.
    Raises:
        RecipeError: transformers has no such class.
        DamagedFileError: the folder lacks weights of it.
    """
    found = language_model(folder)
    # An explicit None makes transformers 5.17 overlook what a quantized folder's config.json names.
    settings = {} if quantization is None else {"quantization_config": quantization}
    if quantization is not None and is_microscaled(vars(found.config)) and not unpacks(quantization):
        vars(found.config).pop("quantization_config")  # what it names is unpacked on the way
    model, report = found.auto.from_pretrained(
        folder,
        **settings,
        config=found.config,
        key_mapping=_key_mapping(folder, found),
        dtype=dtype,
        attn_implementation=attention,
        device_map=None if device is None else {"": device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_missing(folder, report["missing_keys"])
    return as_language_model(model, found)


def language_model_of(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> PreTrainedModel:
    """A folder's language model with tensors that are given instead of its own, on the CPU.

    Args:
        tensors: under the folder's names, those of experts apart or as transformers joins them; of towers ignored.
        dtype: of all weights.
    Raises:
        RecipeError: transformers has no such class.
        DamagedFileError: a weight of it is not among them.
    """
    found = language_model(folder)
    # What names the packing would make transformers look for packed weights.
    vars(found.config).pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = as_language_model(found.auto.from_config(found.config, trust_remote_code=False), found)
    own_name = own_name_of_stored(found.own, parts_too=True)
    named = ((found.names.trained(str(own_name(name))), tensor) for name, tensor in tensors)
    state = joined_experts(skeleton, ((name, tensor) for name, tensor in named if name is not None))
    model, report = type(skeleton).from_pretrained(
        None, config=found.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    _refuse_missing(folder, set(report["missing_keys"]) & set(skeleton.state_dict()))
    return as_language_model(model, found)


def _refuse_missing(folder: Path, names: Iterable[str]) -> None:
    """Weights that a folder lacks, which transformers fills with random numbers and only warns of."""
    if missing := sorted(names):
        what = f"{folder} lacks {counted(len(missing), 'weight')} of its model: {', '.join(missing[:3])}"
        raise DamagedFileError(what, str(folder), "fetch or copy the folder again")


def outer_modules(names: Iterable[str]) -> list[str]:
    """Of names of modules, those that no other of them holds."""
    found: list[str] = []
    for name in sorted(names):
        if not any(name.startswith(f"{other}.") for other in found[-1:]):
            found.append(name)
    return found


def cap_scores(model: PreTrainedModel) -> None:
    """Let a model whose attention caps its scores compute it by its own code, in place.

    torch's kernel has no cap. transformers before 5.20 leaves it out without a word, later releases do as this.
    """
    if model.config._attn_implementation == Attention.sdpa.value and caps_scores(model):
        model.set_attn_implementation(Attention.eager.value)


def caps_scores(model: nn.Module) -> bool:
    """Whether an attention of the model caps its scores."""
    return any(getattr(module, "attn_logit_softcapping", None) for module in model.modules())


def as_language_model(model: PreTrainedModel, found: LanguageModel) -> PreTrainedModel:
    """The model as it is trained, from one of transformers' class for it, in place."""
    cap_scores(model)
    if found.names.outside and not found.names.begins:
        _take_out(model, outer_modules(found.names.outside))
    note_own_names(model, found.names)
    return model


def _take_out(model: nn.Module, names: Iterable[str]) -> None:
    """Exchange modules for ones without weights, in place."""
    for name in names:
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, nn.Identity())


def _key_mapping(folder: Path, found: LanguageModel) -> dict[str, str] | None:
    """What transformers is to rename, as patterns at the begin of a name; None where nothing is."""
    if not found.names.begins:
        return None
    own_name = own_name_of_stored(found.own, parts_too=True)
    begins: dict[str, str] = {}
    for stored in sorted(read_headers(folder)):
        own = own_name(stored)
        trained = None if own is None else found.names.trained(own)
        if trained is not None and trained != stored:
            begin, other = _without_common_end(stored, trained)
            begins[f"^{re.escape(begin)}"] = other
    return begins or None


def _without_common_end(one: str, other: str) -> tuple[str, str]:
    """Two names without the parts that both end with, but for the dot before those."""
    left, right = one.split("."), other.split(".")
    while len(left) > 1 and len(right) > 0 and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return f"{'.'.join(left)}.", f"{'.'.join(right)}." if right else ""


def _begins(language: PreTrainedModel, own: PreTrainedModel) -> dict[str, str] | None:
    """How names begin in a language model's class, and where the own class has the same; None unless it has all."""
    modules = list(own.named_modules())
    if (whole := next((name for name, module in modules if type(module) is type(language)), None)) is not None:
        begins = {"": whole}
    else:
        inner = next((name for name, module in modules if type(module) is type(language.base_model)), None)
        heads = [_name_of(language, language.get_output_embeddings()), _name_of(own, own.get_output_embeddings())]
        if inner is None or None in heads:
            return None
        begins = {language.base_model_prefix: inner, str(heads[0]): str(heads[1])}
    names, shapes = OwnNames(begins), {name: weight.shape for name, weight in _parameters(own)}
    same = all(shapes.get(names.own(name)) == weight.shape for name, weight in _parameters(language))
    return begins if same else None


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _language_parts(own: PreTrainedModel) -> list[str]:
    """Where the own class holds its decoder and the output head."""
    parts = (own.get_decoder(), own.get_output_embeddings())
    return [name for part in parts if (name := _name_of(own, part))]


def _outside(own: PreTrainedModel, parts: Collection[str]) -> Iterator[str]:
    """Names of the modules that neither lie in one of the parts nor hold one."""
    for name, _ in own.named_modules():
        inside = any(name == part or name.startswith(f"{part}.") for part in parts)
        holds = not name or any(part.startswith(f"{name}.") for part in parts)
        if not inside and not holds:
            yield name


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _take_over(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """Let a language model's settings say what the checkpoint's own say for it."""
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantization


def _with_names_of(text: PreTrainedConfig, names: OwnNames) -> PreTrainedConfig:
    """The settings, what is said of modules that are not quantized brought to the language model's own names."""
    said: Mapping[str, Any] | None = getattr(text, "quantization_config", None)
    if isinstance(said, Mapping):
        text.quantization_config = {
            key: [names.trained(name) or name for name in value]
            if key in _NOT_CONVERTED and isinstance(value, list)
            else value
            for key, value in said.items()
        }
    return text


def _no_language_model(folder: Path, config: PreTrainedConfig) -> str:
    kind = printable(str(config.model_type))[:80]
    return (
        f"transformers {metadata.version('transformers')} has no text model for model_type {kind} ({folder}): "
        "it is no decoder, or it is newer than this release"
    )
