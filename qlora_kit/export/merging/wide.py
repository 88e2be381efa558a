"""Which tensors a merged folder holds in fp32, as the base does, beside weights in 16 bit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_kit.export.merging.rounded import weight_beside
from qlora_kit.weights.headers import FLOATS, StoredTensor

if TYPE_CHECKING:
    from qlora_kit.model.stored_names import StoredNames

WIDE = "F32"


def wide_tensors(base: Mapping[str, StoredTensor], names: "StoredNames") -> frozenset[str]:
    """The base's names of them; an adapter that changes one is merged in 16 bit all the same.

    Where most weights of a base are narrower, what is in fp32 was put there for a reason: what experts are chosen by
    differs by less than bf16 can tell apart, and decays of a state add up over a row. Of a base that is wholly in fp32
    the model's own class says what is computed with in fp32.
    """
    own = (one for name, one in base.items() if name not in names.outside and weight_beside(name) not in base)
    weights = [one for one in own if one.dtype in FLOATS]  # packed ones tell nothing of those beside them
    wide = [one for one in weights if one.dtype == WIDE and one.name not in _tables_and_stacks(names)]
    is_mixed = 2 * sum(one.rows * one.width for one in weights if one.dtype == WIDE) < sum(
        one.rows * one.width for one in weights
    )
    return frozenset(one.name for one in wide if is_mixed or one.name in names.kept_in_fp32)


def _tables_and_stacks(names: "StoredNames") -> set[str]:
    parts = {part.tensor for layout in names.stacks.values() for part in layout.parts}
    return parts | {names.embedding, names.head}
