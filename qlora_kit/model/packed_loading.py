"""Has transformers put stacks of experts into 4 bit while it loads them, one after another, as it does linear modules.

transformers' own quantizer for bitsandbytes takes `nn.Linear` alone, and leaves experts in 16 bit without a word.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from qlora_kit.model.microscaled import unpacking_conversions
from qlora_kit.model.stacked_experts import StackedExperts, experts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "bitsandbytes_with_experts"


def stack_experts(model: nn.Module, kept: Collection[str] = ()) -> list[str]:
    """Exchange a model's modules of experts for the kit's, in place.

    Args:
        kept: names of modules that stay as they are, as transformers matches them.
    Returns:
        their names.
    """
    found = {name: one for name, one in experts_of(model).items() if should_convert_module(name, list(kept))}
    for name, module in found.items():
        model.set_submodule(name, StackedExperts(module))
    return list(found)


def with_experts(config: BitsAndBytesConfig, *, microscaled: bool = False) -> BitsAndBytesConfig:
    """The same configuration for the quantizer that takes experts too.

    Args:
        microscaled: whether the checkpoint holds its experts in 4-bit floats.
    """
    config.microscaled = microscaled
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(BitsAndBytesConfig)
        register_quantizer(METHOD)(_Quantizer)
    config.quant_method = METHOD
    return config


def named_plainly(model: "PreTrainedModel") -> None:
    """Call a loaded model's quantization by the name that other libraries know, in place."""
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, BitsAndBytesConfig) and config.quant_method == METHOD:
        config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES


class _Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers is not typed there
    """transformers' quantizer, for stacks of experts as well."""

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", device_map: Any, **kwargs: Any) -> None:
        import bitsandbytes

        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        for name in stack_experts(model, self.modules_to_not_convert):
            experts = model.get_submodule(name)
            assert isinstance(experts, StackedExperts)  # just put there
            for stack in experts.stacks:
                packed = bitsandbytes.nn.Params4bit(
                    experts.get_parameter(stack).data,
                    requires_grad=False,
                    compress_statistics=self.quantization_config.bnb_4bit_use_double_quant,
                    quant_type=self.quantization_config.bnb_4bit_quant_type,
                    quant_storage=self.quantization_config.bnb_4bit_quant_storage,
                )
                experts.register_parameter(stack, packed)

    def get_weight_conversions(self) -> list[Any]:
        """What is made of stored tensors before it is put into 4 bit."""
        return unpacking_conversions() if self.quantization_config.microscaled else []

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is put into 4 bit: the weight of a linear module, or a stack of experts."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, StackedExperts):
            return name in module.stacks
        needs: bool = super().param_needs_quantization(model, param_name, **kwargs)
        return needs
