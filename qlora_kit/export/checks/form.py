"""A model's linear layers and what else decides which formats can hold it, without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.weights.microscaled import read_weights
from qlora_kit.weights.own_names import own_names_of

Shapes = Mapping[str, tuple[int, int]]
HEAD = "lm_head"


@dataclass(frozen=True)
class ModelForm:
    """What a model is made of.

    Attributes:
        config: its config.json, every default filled in.
        blocks: (out_features, in_features) of the linear layers inside its blocks, experts one by one, by the folder's
            names for them; what chooses among experts is none of them.
        outside: those outside of the blocks, but for the output head.
        parameters: shape of every parameter, by name.
        modules: last parts of the names of its modules.
        kinds: class names of its modules.
        head: name of its output head.
        stored: names of the tensors that the folder holds; none where it holds no weights.
        filled_in: those of `blocks` that must have a plain weight, or transformers cannot load them.
        is_renamed: whether the folder has other names for its layers than the model.
        folder: that holds the weights in 16 or 32 bit, and names them as a merged one will; None where there is none.
        is_part: whether the folder holds more than this language model.
        otherwise: layers and experts that the folder holds in a way of its own, so that no quantizer of layers fits.
    """

    config: Mapping[str, Any]
    blocks: Shapes
    outside: Shapes
    parameters: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    kinds: frozenset[str]
    head: str
    stored: frozenset[str] = frozenset()
    otherwise: tuple[str, ...] = ()
    filled_in: tuple[str, ...] = ()
    is_renamed: bool = False
    is_part: bool = False
    folder: Path | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        """Weights of experts that lie in one parameter of three axes, which libraries do not take for linear layers."""
        return tuple(name for name, shape in self.parameters.items() if len(shape) == 3 and ".experts." in name)

    @property
    def is_stored_otherwise(self) -> bool:
        """Whether the folder holds no layer under a name that transformers knows."""
        return bool(self.otherwise) and not self.blocks

    @property
    def first_layer(self) -> str:
        """The name of a layer, as an example."""
        return next(iter((*self.otherwise, *self.blocks)), "none")

    @property
    def strange_experts(self) -> str:
        """Why experts cannot be quantized one by one; empty where they can, or there are none."""
        held = {name.rpartition(".")[0] for name in self.experts}
        strange = next((name for name in self.otherwise if name in held), "")
        return f"its experts ('{strange}') are kept in a way that cannot be taken apart" if strange else ""

    def unquantized(self, names: tuple[str, ...], whys: list[str]) -> Unquantized | None:
        """What a quantizer of layers leaves in 16 bit: these layers, and those that the folder holds in its own way."""
        whys = [*whys, *(["the folder holds them in a way of its own"] if self.otherwise else [])]
        left = (*names, *self.otherwise)
        return Unquantized(left, len(self.blocks) + len(self.otherwise), ", and ".join(whys)) if left else None

    @property
    def told(self) -> str:
        """The kinds of layers where weights lie that are not linear layers."""
        return "Conv1D" if "Conv1D" in self.kinds else str(self.config.get("model_type"))


def model_form(folder: Path) -> ModelForm | None:
    """The form of a model folder; None where transformers cannot build it as a causal language model.

    Builds the architecture on torch's meta device; a moment for any size.
    """
    import torch

    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.export.stored_linears import headers_or_own, stored_linears
    from qlora_kit.model.skeleton import skeleton
    from qlora_kit.model.stored_names import stored_names

    try:
        model = skeleton(folder)
        prefix, _ = decoder_layers(model)
    except Exception:  # of a stranger's config.json anything may come
        return None  # what cannot be loaded is refused by name where it would be
    named = dict(model.named_modules())
    found = stored_linears(model, stored_names(folder, headers_or_own(folder)))
    outside = {
        name: (module.out_features, module.in_features)
        for name, module in named.items()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != HEAD and not name.startswith(f"{prefix}.")
    }
    settings = read_json(folder / "config.json")
    fields = {
        **model.config.get_text_config().to_dict(),
        "architectures": settings.get("architectures"),
    }
    fields.pop("quantization_config", None)
    has_weights = any(folder.glob("*.safetensors"))
    return ModelForm(
        config=fields,
        blocks=found.shapes,
        outside=outside,
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        modules=frozenset(name.rpartition(".")[2] for name in named),
        kinds=frozenset(type(module).__name__ for module in named.values()),
        head=next((name for name, module in named.items() if module is model.get_output_embeddings()), ""),
        stored=frozenset(read_weights(folder)) if has_weights else frozenset(),
        folder=folder if has_weights and "quantization_config" not in settings else None,
        otherwise=found.otherwise,
        filled_in=found.filled_in,
        is_part=own_names_of(model).is_part,
        is_renamed=any(linear.module != linear.name for linear in found.linears if not linear.is_expert),
    )


def no_linear_layers(layout: str, form: ModelForm) -> str:
    """Why a family has no file in a layout of linear layers."""
    return f"this family has no {layout} file: its layers are no linear layers ({form.told})"
