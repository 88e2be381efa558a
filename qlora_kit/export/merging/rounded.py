"""Base weights as the adapter met them in training: rounded by bitsandbytes and read back, or stored that way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json
from qlora_kit.export.merging.packed import PackedWeight, can_pack, pack_weight
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import StoredTensor
from qlora_kit.weights.microscaled import STORED_AS
from qlora_kit.weights.own_names import own_names_of
from qlora_kit.weights.torch_rows import read_whole

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

# What bitsandbytes stores beside a weight, by the end of the name after the module's.
STATE_4BIT = (".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
STATE_4BIT_KINDS = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
STATE_8BIT = (".SCB", ".weight_format")


@dataclass(frozen=True)
class Rounding:
    """How the frozen linear weights were held in training."""

    quant: QuantConfig
    device: "device"

    def unrounded(self, weight: "Tensor") -> "Tensor":
        """A weight that is only brought to the format of the activations; float32."""
        return weight.to(self._compute()).to(self.device).float()

    def met(self, weight: "Tensor") -> "Tensor":
        """The weight that the products of training read: rounded, and read back in the format of the activations."""
        return self.round_trip(weight.to(self._compute())).float()

    def exact(self, weight: "Tensor") -> "Tensor":
        """The rounded weight in float32, without the rounding to the format of the activations on top."""
        if self.packs(tuple(weight.shape)):
            return self.packed([weight], tuple(weight.shape))[:]
        return self.round_trip(weight.to(self._compute()).float()).float()

    def packs(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is rounded some rows at a time, and stays packed until they are read."""
        return self.quant.kind in (QuantKind.nf4, QuantKind.fp4) and self.device.type == "cpu" and can_pack(shape)

    def packed(self, blocks: "Iterable[Tensor]", shape: tuple[int, ...]) -> PackedWeight:
        """What `exact` gives, still packed; for the arguments see `packed.pack_weight`."""
        import torch

        compute = self._compute()
        near = blocks if compute == torch.float32 else (block.to(compute) for block in blocks)
        return pack_weight(near, shape, self.quant.kind.value, self.quant.double_quant)

    def _compute(self) -> "dtype":
        from qlora_kit.model.load import torch_dtype

        return torch_dtype(self.quant.compute_dtype)

    def round_trip(self, weight: "Tensor") -> "Tensor":
        """Round to the recipe's format with bitsandbytes' own parameter classes, and read back.

        Args:
            weight: a floating-point weight [rows, columns] on the CPU.
        """
        import bitsandbytes as bnb

        dense: Tensor
        if self.quant.kind is QuantKind.int8:
            eight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(self.device)
            dense = bnb.functional.int8_vectorwise_dequant(eight.data, eight.SCB)
        else:
            four = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=self.quant.double_quant,
                quant_type=self.quant.kind.value,
            ).to(self.device)
            dense = bnb.functional.dequantize_4bit(four.data, four.quant_state)
        return dense


def rounded_modules(base: Path, quant: QuantConfig) -> set[str]:
    """Names, in the checkpoint's own class, of the modules whose weight the recipe's loading would round."""
    from qlora_kit.model.load import rounded_names
    from qlora_kit.model.skeleton import skeleton

    model = skeleton(base)
    names = own_names_of(model)
    return {names.own(name) for name in rounded_names(model, quant)}


def is_stored_rounded(base: Path) -> bool:
    """Whether the folder itself holds bitsandbytes weights.

    Raises:
        RunError: it is quantized in another way.
    """
    stored: Mapping[str, Any] | None = read_json(base / "config.json").get("quantization_config")
    if stored and stored.get("quant_method") == STORED_AS:
        return False  # its values are read as 16-bit weights
    if stored and stored.get("quant_method") != "bitsandbytes":
        raise RunError(
            f"the base is quantized with {stored.get('quant_method')}; an adapter is merged into 16-bit weights "
            "or bitsandbytes'",
            where=str(base / "config.json"),
        )
    return bool(stored)


def weight_beside(name: str) -> str | None:
    """The weight that a tensor of bitsandbytes' state belongs to; None for any other tensor."""
    for end in (*STATE_4BIT, *STATE_4BIT_KINDS, *STATE_8BIT):
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight"
    return None


def stored_shape(weight: StoredTensor, state: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """Shape of a stored weight when it is read back."""
    if any(end in name for name in state for end in STATE_8BIT):
        return weight.shape
    return tuple(_packed_state(weight, state).shape)


def read_stored(weight: StoredTensor, state: Mapping[str, StoredTensor], where: "device") -> "Tensor":
    """A weight that is stored as bitsandbytes wrote it, in float32 [rows, columns]."""
    import bitsandbytes as bnb

    values = read_whole(weight).to(where)
    scales = state.get(f"{weight.name.removesuffix('.weight')}.SCB")
    dense: Tensor
    if scales is not None:
        dense = bnb.functional.int8_vectorwise_dequant(values, read_whole(scales).to(where))
    else:
        dense = bnb.functional.dequantize_4bit(values, _packed_state(weight, state, where))
    return dense.float()


def _packed_state(weight: StoredTensor, state: Mapping[str, StoredTensor], where: "device | str" = "cpu") -> Any:
    from bitsandbytes.functional import QuantState

    found = {name.removeprefix(f"{weight.name}."): read_whole(tensor) for name, tensor in state.items()}
    try:
        return QuantState.from_dict(found, device=where)
    except (ValueError, KeyError, AssertionError) as error:
        raise RunError(
            f"{weight.file.name} does not hold the whole 4-bit state of {weight.name} ({error})", where=str(weight.file)
        ) from error


def taken_out(met: "Tensor", rank: int, init: str) -> "Tensor":
    """What an initialization took out of the base: the scaled product of its first factors, float32.

    olora: the first `rank` columns of Q times rows of R (Buyukakyuz 2024), which the caller scales; pissa: the
    largest `rank` singular triples (Meng et al. 2024), where the scale cancels.
    """
    import torch

    product: Tensor
    if init == "olora":
        q, r = torch.linalg.qr(met)
        product = q[:, :rank] @ r[:rank]
    else:
        u, s, v = torch.linalg.svd(met, full_matrices=False)
        product = (u[:, :rank] * s[:rank]) @ v[:rank]
    return product
