"""AWQ in both of its layouts, as the registry knows them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import Required, quantized_problems
from qlora_kit.export.serving.commands import SERVE_SGLANG, SERVE_VLLM, Server, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.format import UNPACKED, Format
from qlora_kit.formats.gptqmodel_settings import READER_PACKAGES
from qlora_kit.formats.job import ExportSource, Written
from qlora_kit.formats.settings import is_coarse, whole
from qlora_kit.schema.export import AwqLayout, AwqTarget

if TYPE_CHECKING:
    from qlora_kit.export.checks.fault import Unquantized
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.weights.reader import WeightReader

_REQUIRED = (
    Required(("quant_method",), ("awq",)),
    Required(("bits", "w_bit"), (4,)),
    Required(("group_size", "q_group_size")),
    Required(("zero_point",), (True, False)),
)


class Awq(Format[AwqTarget]):
    """AWQ in the layout GEMM."""

    name = "awq"
    usual = "awq_4bit"
    group = "awq"
    order = 6
    is_calibrated = True
    is_made_by_layer = maps_names = True
    layout: ClassVar[AwqLayout] = AwqLayout.gemm
    reader = "transformers with gptqmodel"
    hub = Hub("transformers", "quantized", ("awq",))
    servers: ClassVar[tuple[Server, ...]] = (transformers(*READER_PACKAGES), SERVE_VLLM, SERVE_SGLANG)

    def accepts(self, target: AwqTarget) -> bool:
        """Whether it has this layout."""
        return target.layout is self.layout

    def group_size(self, target: AwqTarget) -> int:
        """Weights that share a scale."""
        return target.group_size

    def problems(
        self, path: str, target: AwqTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What the layout asks of a model that it has not."""
        from qlora_kit.formats.awq.checks import awq_problems

        return awq_problems(path, target, form)

    def unquantized(self, target: AwqTarget, form: "ModelForm") -> "Unquantized | None":
        """Layers that the kernels do not take."""
        from qlora_kit.formats.awq.checks import awq_unquantized

        return awq_unquantized(target, form)

    def write(self, source: ExportSource, target: AwqTarget, out: Path) -> Written:
        """Quantize."""
        from qlora_kit.formats.awq.write import write_awq

        return Written(uncalibrated=write_awq(source.merged, out, target, source.calibration))

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader":
        """A reader of the weights that the folder stands for."""
        from qlora_kit.formats.awq.weights import awq_weights

        return awq_weights(artifact, merged)

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Bits of the target."""
        return whole(settings.get("bits"))

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """Smaller groups, which the layout GEMV has not, then another format: there is one number of bits."""
        is_gemm = settings.get("layout") == AwqLayout.gemm.value
        finer = is_gemm and is_coarse(whole(settings.get("group_size")))
        more_bits = "a format with more bits (gguf_q8_0, gptq_8bit)"
        return ("smaller groups (group_size: 32)", more_bits) if finer else (more_bits,)

    def load(self, folder: Path) -> Any:
        """The model, with gptqmodel's layers or with its weights unpacked."""
        from qlora_kit.formats.awq.load import load_awq
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_awq(folder)

    def read_by(self, folder: Path) -> str:
        """The library, or the kit."""
        from qlora_kit.formats.gptqmodel_folders import is_read_by_library

        return self.reader if is_read_by_library(folder) else UNPACKED

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, _REQUIRED)


class AwqGemv(Awq):
    """AWQ in the layout GEMV, which no server reads."""

    name = "awq_gemv"
    usual = ""
    layout = AwqLayout.gemv
    reader = "transformers with gptqmodel, without a GPU its gemm twin"
    servers = (transformers(*READER_PACKAGES),)
    checked_servers = ()
