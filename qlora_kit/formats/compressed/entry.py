"""The entry of config.json that names the packing, as llmcompressor writes it."""

from collections.abc import Sequence
from typing import Any

from qlora_kit.export.stored_linears import StoredLinears

OUTPUT_HEAD = "lm_head"


def config_entry(scheme: Any, form: str, ignore: Sequence[str]) -> dict[str, object]:
    """The entry.

    Args:
        scheme: of compressed-tensors, for all linear layers.
        form: of the tensors.
        ignore: modules that are not quantized.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        ignore=list(ignore),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    whole: dict[str, object] = config.model_dump(mode="json")
    return whole | {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}


def ignored(found: StoredLinears, unfit: Sequence[str] = ()) -> list[str]:
    """What stays in 16 bit in a folder, in the words of compressed-tensors: names, and expressions for towers.

    Args:
        unfit: layers that the format does not hold.
    """
    return [*unfit, *found.otherwise, *found.kept, *(rf"re:.*\b{tower}\b.*" for tower in found.towers)]
