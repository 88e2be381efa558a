"""GPTQ, as the registry knows it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import Required, quantized_problems
from qlora_kit.export.serving.commands import SERVE_SGLANG, SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.format import UNPACKED, Format
from qlora_kit.formats.gptqmodel_settings import READER_PACKAGES
from qlora_kit.formats.job import ExportSource, Written
from qlora_kit.formats.settings import is_coarse, whole
from qlora_kit.schema.export import ExportConfig, GptqMethod, GptqTarget

if TYPE_CHECKING:
    from qlora_kit.export.budget.choose import Formats
    from qlora_kit.export.checks.fault import Unquantized
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.weights.reader import WeightReader

_REQUIRED = (
    Required(("quant_method",), ("gptq",)),
    Required(("bits",), (2, 3, 4, 8)),
    Required(("group_size",)),
    Required(("desc_act",), (True, False)),
)


class Gptq(Format[GptqTarget]):
    """GPTQ."""

    name = "gptq"
    usual = "gptq_4bit"
    group = "gptq"
    order = 5
    compiles = "the extra gptq compiles a package while it is installed"
    is_calibrated = True
    is_made_by_layer = maps_names = True
    reader = "transformers with gptqmodel"
    hub = Hub("transformers", "quantized", ("gptq",))
    servers = (transformers(*READER_PACKAGES), SERVE_VLLM, SERVE_SGLANG)

    def group_size(self, target: GptqTarget) -> int:
        """Weights that share a scale."""
        return target.group_size

    def problems(
        self, path: str, target: GptqTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What the layout asks of a model that it has not."""
        from qlora_kit.formats.gptq.checks import gptq_problems

        return gptq_problems(path, target, form)

    def unquantized(self, target: GptqTarget, form: "ModelForm") -> "Unquantized | None":
        """The few layers that do not fit the layout."""
        from qlora_kit.formats.gptq.checks import gptq_unquantized

        return gptq_unquantized(target, form)

    def layer_formats(self, target: GptqTarget, shapes: Mapping[str, tuple[int, int]]) -> "Formats":
        """The numbers of bits of each layer."""
        from qlora_kit.formats.gptq.budget import GptqFormats

        return GptqFormats.of(target, shapes)

    def with_shared(self, target: GptqTarget, export: ExportConfig) -> GptqTarget:
        """The target with the shared budget of bits, where it has none of its own."""
        return replace(target, bits_budget=export.bits_budget) if target.bits_budget is None else target

    def write(self, source: ExportSource, target: GptqTarget, out: Path) -> Written:
        """Spend the budget, where there is one, and quantize."""
        from qlora_kit.formats.gptq.budget import allocate_gptq
        from qlora_kit.formats.gptq.write import write_gptq

        spent = None
        if target.bits_budget is not None:
            target, spent = allocate_gptq(source.merged, target, target.bits_budget, source.calibration)
        return Written(spent, write_gptq(source.merged, out, target, source.calibration))

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader":
        """A reader of the weights that the folder stands for."""
        from qlora_kit.formats.gptq.weights import gptq_weights

        return gptq_weights(artifact)

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Bits of the target."""
        return whole(settings.get("bits"))

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """GPTQ instead of rounding, smaller groups, 8 bits."""
        is_plain = settings.get("method") == GptqMethod.rounding.value
        group, bits = whole(settings.get("group_size")), whole(settings.get("bits"))
        return (
            *(("GPTQ instead of plain rounding (method: gptq)",) if is_plain else ()),
            *(("smaller groups (group_size: 32)",) if is_coarse(group) else ()),
            *(("8 bits (gptq_8bit)",) if bits < 8 else ()),
        )

    def load(self, folder: Path) -> Any:
        """The model, with gptqmodel's layers or with its weights unpacked."""
        from qlora_kit.formats.gptq.load import load_gptq
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_gptq(folder)

    def read_by(self, folder: Path) -> str:
        """The library, or the kit."""
        from qlora_kit.formats.gptqmodel_folders import is_read_by_library

        return self.reader if is_read_by_library(folder) else UNPACKED

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, _REQUIRED)
