"""A model's linear layers and what else decides which formats can hold it, without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.weights.headers import read_headers

Shapes = Mapping[str, tuple[int, int]]
HEAD = "lm_head"


@dataclass(frozen=True)
class ModelForm:
    """What a model is made of.

    Attributes:
        config: its config.json, every default filled in.
        blocks: (out_features, in_features) of the linear layers inside its blocks, by name.
        outside: those outside of the blocks, but for the output head.
        parameters: shape of every parameter, by name.
        modules: last parts of the names of its modules.
        kinds: class names of its modules.
        head: name of its output head.
        stored: names of the tensors that the folder holds; none where it holds no weights.
    """

    config: Mapping[str, Any]
    blocks: Shapes
    outside: Shapes
    parameters: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    kinds: frozenset[str]
    head: str
    stored: frozenset[str] = frozenset()

    @property
    def experts(self) -> tuple[str, ...]:
        """Weights of experts that lie in one parameter of three axes, which no format here takes for linear layers."""
        return tuple(name for name, shape in self.parameters.items() if len(shape) == 3 and ".experts." in name)

    @property
    def told(self) -> str:
        """The kinds of layers where weights lie that are not linear layers."""
        return "Conv1D" if "Conv1D" in self.kinds else str(self.config.get("model_type"))

    @property
    def is_stored_otherwise(self) -> bool:
        """Whether the folder has other names for the layers than the model, under which no library's files fit."""
        return bool(self.stored) and not any(f"{name}.weight" in self.stored for name in self.blocks)

    @property
    def has_experts_apart(self) -> bool:
        """Whether the folder holds each expert by itself, as libraries name them that quantize one by one."""
        begins = {name.partition(".experts.")[0] + ".experts.0." for name in self.experts}
        return all(any(name.startswith(begin) for name in self.stored) for begin in begins)

    @property
    def has_nested_rope(self) -> bool:
        """Whether layers of one kind rotate otherwise than those of another."""
        rope = self.config.get("rope_parameters")
        return isinstance(rope, Mapping) and any(isinstance(value, Mapping) for value in rope.values())


def model_form(folder: Path) -> ModelForm | None:
    """The form of a model folder; None where transformers cannot build it as a causal language model.

    Builds the architecture on torch's meta device; a moment for any size.
    """
    import torch

    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.model.skeleton import skeleton

    try:
        model = skeleton(folder)
        prefix, _ = decoder_layers(model)
    except Exception:  # of a stranger's config.json anything may come
        return None  # what cannot be loaded is refused by name where it would be
    named = dict(model.named_modules())
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in named.items()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != HEAD
    }
    inside = {name: shape for name, shape in linears.items() if name.startswith(f"{prefix}.")}
    fields = {
        **model.config.get_text_config().to_dict(),
        "architectures": read_json(folder / "config.json").get("architectures"),
    }
    fields.pop("quantization_config", None)
    return ModelForm(
        config=fields,
        blocks=inside,
        outside={name: shape for name, shape in linears.items() if name not in inside},
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        modules=frozenset(name.rpartition(".")[2] for name in named),
        kinds=frozenset(type(module).__name__ for module in named.values()),
        head=next((name for name, module in named.items() if module is model.get_output_embeddings()), ""),
        stored=frozenset(read_headers(folder)) if any(folder.glob("*.safetensors")) else frozenset(),
    )


def experts_unquantized(form: ModelForm) -> Unquantized | None:
    """Experts, which no library takes for linear layers."""
    if not form.experts:
        return None
    return Unquantized(form.experts, len(form.blocks) + len(form.experts), "experts lie in one parameter")


def no_linear_layers(layout: str, form: ModelForm) -> str:
    """Why a family has no file in a layout of linear layers."""
    return f"this family has no {layout} file: its layers are no linear layers ({form.told})"
