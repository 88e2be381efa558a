"""The tensors of a model under their GGUF names: shapes, where the values come from, what is done to them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.families.family import ConfigFields, GgufRules
from qlora_kit.formats.gguf.mixes import Mix, MixContext, requires_imatrix, tensor_type
from qlora_kit.formats.gguf.overrides import overridden_types
from qlora_kit.formats.gguf.roles import is_quantizable, kept_type, places_of
from qlora_kit.weights.float_rows import (
    FloatRows,
    read_float_rows,
    read_picked_rows,
    read_stored_rows,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: GGUF name, block type, and the stored tensor it is made from.

    `rotated_heads`: heads whose rows are reordered for llama.cpp's rotary embedding, 0 for none.
    `offset`: added to every value. `importance`: weight of each column when blocks are fitted, float32 [width], or
    [matrices, width] where a tensor holds several. `type` is empty until a mix gives one.
    """

    name: str
    type: str
    stored: FloatRows
    rotated_heads: int = 0
    offset: float = 0.0
    importance: "npt.NDArray[np.float32] | None" = field(default=None, compare=False, repr=False)

    @property
    def takes_stored_bits(self) -> bool:
        """Whether the 16-bit numbers of the file are made from those that are stored, without widening them."""
        kinds = {"F16": ("F16", "BF16"), "BF16": ("BF16",)}
        return self.stored.dtype in kinds.get(self.type, ()) and not self.offset

    def stored_rows(
        self, start: int, stop: int, room: "npt.NDArray[np.uint16] | None" = None
    ) -> "npt.NDArray[np.uint16]":
        """Rows start..stop of a 16-bit matrix as they are stored and ordered as in the file; see `read_stored_rows`."""
        if self.rotated_heads:
            return read_stored_rows(self.stored, paired_order(self.stored.rows, self.rotated_heads)[start:stop])
        return read_stored_rows(self.stored, slice(start, stop), room)

    def rows(self, start: int, stop: int) -> "npt.NDArray[np.float32]":
        """Rows start..stop as they belong into the file, float32 of shape [stop - start, width]."""
        if self.rotated_heads:
            # a projection's bias is one row in memory, yet has one entry per row of the weight
            stored = self.stored if len(self.stored.shape) > 1 else _as_column(self.stored)
            values = read_picked_rows(stored, paired_order(stored.rows, self.rotated_heads)[start:stop])
            values = values if len(self.stored.shape) > 1 else values.reshape(1, -1)
        else:
            values = read_float_rows(self.stored, start, stop)
        return values + self.offset if self.offset else values

    def all_rows(self) -> "npt.NDArray[np.float32]":
        """The whole tensor, float32 of shape [rows, width]; a vector is one row."""
        whole = self.stored.width if self.rotated_heads and len(self.stored.shape) == 1 else self.stored.rows
        return self.rows(0, whole)


def _as_column(vector: FloatRows) -> FloatRows:
    return FloatRows(vector.file, vector.offset, vector.dtype, (vector.shape[0], 1))


def paired_order(rows: int, heads: int) -> "npt.NDArray[np.int64]":
    """`[rows]`: which stored row each row of the file comes from: the two halves of a head, interleaved."""
    import numpy as np

    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def named_tensors(
    found: Mapping[str, FloatRows], architecture: GgufRules, config: ConfigFields
) -> tuple[list[PlannedTensor], MixContext]:
    """Every tensor of the file, without a type, and the shape that the type rules look at.

    Args:
        found: tensors of a folder, or those that will be there once the model is merged.

    Raises:
        RecipeError: a tensor has no GGUF name in this architecture, or one that llama.cpp needs is missing.
    """
    stored = _without_unused(found, config)
    model = MixContext(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        tied_embeddings="lm_head.weight" not in stored,
        seventy_b=architecture.seventy_b,
    )
    names = gguf_names(stored, architecture.name, model.layers)
    tensors = [
        PlannedTensor(
            name=names[source],
            type="",
            stored=tensor,
            rotated_heads=rotated_heads_of(source, architecture, config),
            offset=architecture.norm_offset if names[source].endswith("_norm.weight") else 0.0,
        )
        for source, tensor in stored.items()
    ]
    return tensors, model


def typed_tensors(
    tensors: Sequence[PlannedTensor],
    model: MixContext,
    mix: Mix,
    *,
    overrides: Mapping[str, str] | None = None,
    has_imatrix: bool = False,
) -> list[PlannedTensor]:
    """The tensors with the types of a mix, in the order of the file: by layer, then by name.

    Args:
        overrides: glob on GGUF names to the type that replaces the mix's choice.
        has_imatrix: whether there will be an importance matrix; some rules depend on it.

    Raises:
        RecipeError: an override cannot be followed, or a type needs an importance matrix and there is none.
    """
    model = replace(model, has_imatrix=has_imatrix)
    ordered = sorted(tensors, key=lambda tensor: _place(tensor.name))
    wanted = overridden_types(overrides or {}, {tensor.name: tensor.stored.shape for tensor in ordered})
    quantized = [one.name for one in ordered if is_quantizable(one.name, one.stored.shape)]
    places = places_of(quantized, model.layers, model.experts)

    def kind(name: str, stored: FloatRows) -> str:
        if not is_quantizable(name, stored.shape):
            return kept_type(name, stored.dtype, stored.shape)
        return tensor_type(name, stored.shape, mix, model, places.get(name), wanted.get(name))

    planned = [replace(tensor, type=kind(tensor.name, tensor.stored)) for tensor in ordered]
    if not has_imatrix:
        _refuse_types_that_need_an_imatrix(planned, mix)
    return planned


def _refuse_types_that_need_an_imatrix(tensors: Sequence[PlannedTensor], mix: Mix) -> None:
    needing = [tensor for tensor in tensors if requires_imatrix(tensor.name, tensor.type, mix)]
    if needing:
        raise RecipeError(
            f"{needing[0].type} without an importance matrix gives garbage: {needing[0].name} "
            f"and {len(needing) - 1} other tensors would have types that need one",
            where="export.gguf.<name>.imatrix",
            fix="imatrix: true",
        )


def _without_unused(stored: Mapping[str, FloatRows], config: ConfigFields) -> dict[str, FloatRows]:
    skipped = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    kept = {
        name: tensor
        for name, tensor in stored.items()
        if name not in skipped and not name.endswith("rotary_emb.inv_freq")
    }
    if "model.embed_tokens.weight" not in kept:
        raise RecipeError("the weights hold no model.embed_tokens.weight", fix="give a merged model, not an adapter")
    if not config.get("tie_word_embeddings") and "lm_head.weight" not in kept:
        raise RecipeError(
            "the weights hold no lm_head.weight, yet config.json says that the embeddings are not tied",
            where="config.json, tie_word_embeddings",
        )
    return kept


def gguf_names(sources: Iterable[str], architecture: str, layers: int) -> dict[str, str]:
    """llama.cpp's name of every Hugging Face tensor name.

    Args:
        architecture: llama.cpp's name of it.

    Raises:
        RecipeError: one has none.
    """
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], layers)
    names = {source: table.get_name(source, try_suffixes=(".weight", ".bias")) for source in sources}
    unnamed = [source for source, name in names.items() if name is None]
    if unnamed:
        raise RecipeError(
            f"{counted(len(unnamed), 'tensor has', 'tensors have')} no place in llama.cpp's "
            f"{architecture}, first {unnamed[0]}",
            fix="give a merged model without adapter or quantization tensors",
        )
    return names


def rotated_heads_of(source: str, architecture: GgufRules, config: ConfigFields) -> int:
    """Heads whose rows llama.cpp wants in `paired_order`; 0 where a tensor stays as it is."""
    if not architecture.pairs_rotary_halves:
        return 0
    if ".q_proj." in source:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in source else 0


def _place(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)
