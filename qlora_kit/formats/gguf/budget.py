"""A GGUF file's budget of bits: the block types that its layers may have, libgguf's rounding to them, the choice."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.extras import require
from qlora_kit.core.files import read_json
from qlora_kit.export.budget.choose import Allocation, choose_formats
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.architectures import find_architecture, has_own_rules
from qlora_kit.formats.gguf.converter.package import find_known
from qlora_kit.formats.gguf.mixes import BLOCK_SIZES, is_weighted
from qlora_kit.formats.gguf.tensors import gguf_names
from qlora_kit.schema.export import GgufTarget

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from qlora_kit.formats.gguf.imatrix import ImportanceMatrix

# Those that every build of llama.cpp multiplies fast; codebook types are slow to try and slow on a CPU.
_WIDE_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_NARROW_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_WIDE_BLOCK, _NARROW_BLOCK = 256, 32


@dataclass(frozen=True)
class GgufFormats:
    """What a target leaves open in the layers of a model.

    Attributes:
        names: GGUF name of each layer's weight.
        shapes: (out_features, in_features) of each layer.
        importance: what blocks are fitted to, by GGUF name; empty where they are not.
    """

    target: GgufTarget
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    importance: "Mapping[str, npt.NDArray[np.float32]]"

    def groups(self) -> list[tuple[str, ...]]:
        """Every layer by itself; those whose width no block divides stay in 16 bits and are in none."""
        return [(name,) for name, (_, width) in self.shapes.items() if width % _NARROW_BLOCK == 0]

    def bits(self, name: str) -> dict[str, float]:
        """Bits a weight by format, with the scales of its blocks."""
        gguf = require("gguf", "writing a GGUF file", EXTRA)
        types = _NARROW_TYPES if self.shapes[name][1] % _WIDE_BLOCK else _WIDE_TYPES
        sizes = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] for kind in types}
        return {kind: size * 8 / BLOCK_SIZES[kind] for kind, size in sizes.items()}

    def rounded(self, name: str, weight: "Tensor", format: str) -> "Tensor":
        """Whole rows of a layer's weight as their blocks stand for them, float32."""
        libgguf, gguf = (require(package, "writing a GGUF file", EXTRA) for package in ("libgguf", "gguf"))
        import torch

        importance = self.importance.get(self.names[name]) if is_weighted(format) else None
        blocks = libgguf.quantize_rows(
            weight.detach().cpu().contiguous().numpy(), libgguf.GGMLQuantizationType[format], imatrix=importance
        )
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[format])
        return torch.from_numpy(values.reshape(weight.shape)).to(weight.device)

    @property
    def needs_moments(self) -> bool:
        """Whether what the method leaves of an error depends on the inputs: blocks are rounded by themselves."""
        return False

    def error_left(self, name: str, weight: "Tensor", format: str, mass: "Tensor", moment: "Tensor | None") -> float:
        """Share of the error that is left: all of it."""
        return 1.0

    def chosen(self, formats: Mapping[str, str]) -> GgufTarget:
        """The target with the formats as overrides, tensor by tensor, behind its own."""
        found = {self.names[name]: kind for name, kind in formats.items()}
        return replace(self.target, overrides={**self.target.overrides, **found})


def allocate_gguf(
    model_dir: Path, target: GgufTarget, budget: float, imatrix: "ImportanceMatrix"
) -> tuple[GgufTarget, Allocation]:
    """Spend a budget on the matrices of a GGUF file's blocks; embeddings and output matrix keep the mix's types.

    Args:
        imatrix: holds the calibration rows, and what blocks are fitted to where the target says so.

    Returns:
        the target with overrides, and what they are.

    Raises:
        RecipeError: a budget that no choice meets, or no calibration rows.
    """
    shapes = linear_shapes(model_dir)
    importance = imatrix.means if target.imatrix else {}
    formats = GgufFormats(target, gguf_names_of(model_dir, shapes), shapes, importance)
    spent = choose_formats(model_dir, formats, budget, imatrix.rows)
    return formats.chosen({name: kind for name, (kind, _) in spent.layers.items()}), spent


def gguf_names_of(model_dir: Path, names: Mapping[str, object]) -> dict[str, str]:
    """GGUF name of the weight of each linear layer.

    Raises:
        RecipeError: an architecture without GGUF export.
    """
    config = read_json(model_dir / "config.json")
    return budget_names(config, names)


def budget_names(config: ConfigFields, names: Iterable[str]) -> dict[str, str]:
    """The same by a configuration.

    Raises:
        RecipeError: an architecture without GGUF export, or a layer without a name in it.
    """
    architecture = find_architecture(config).name if has_own_rules(config) else find_known(config).llama_cpp
    weights = gguf_names((f"{name}.weight" for name in names), architecture, config["num_hidden_layers"])
    return {name.removesuffix(".weight"): found for name, found in weights.items()}
