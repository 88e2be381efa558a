"""compressed-tensors, as the registry knows it."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import quantized_problems
from qlora_kit.export.serving.commands import SERVE_SGLANG, SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.compressed.server_files import REQUIRED, group_problems
from qlora_kit.formats.format import UNPACKED, Format
from qlora_kit.formats.job import ExportSource, Written
from qlora_kit.schema.export import CompressedTarget

if TYPE_CHECKING:
    from qlora_kit.export.checks.fault import Unquantized
    from qlora_kit.export.checks.form import ModelForm

_WEIGHT_BITS = {"W4A16": 4, "W8A16": 8, "NVFP4A16": 4}


class Compressed(Format[CompressedTarget]):
    """compressed-tensors."""

    name = "compressed"
    usual = "w8a16"
    group = "compressed"
    order = 4
    is_made_by_layer = maps_names = True
    reader = "transformers with compressed-tensors"
    hub = Hub("transformers", "quantized", ("compressed-tensors",))
    servers = (transformers("compressed-tensors"), SERVE_VLLM, SERVE_SGLANG)

    def problems(
        self, path: str, target: CompressedTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What the scheme asks of a model that it has not."""
        from qlora_kit.formats.compressed.checks import compressed_problems

        return compressed_problems(path, target, form)

    def unquantized(self, target: CompressedTarget, form: "ModelForm") -> "Unquantized | None":
        """Layers that the packing does not hold."""
        from qlora_kit.formats.compressed.checks import compressed_unquantized

        return compressed_unquantized(target, form)

    def write(self, source: ExportSource, target: CompressedTarget, out: Path) -> Written:
        """Quantize."""
        from qlora_kit.formats.compressed.write import write_compressed

        return Written(uncalibrated=write_compressed(source.merged, out, target, source.calibration))

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Bits of the scheme, where activations are as they are; where they are rounded, RTN is no baseline."""
        return _WEIGHT_BITS.get(str(settings.get("scheme")))

    def load(self, folder: Path) -> Any:
        """The model, its weights unpacked, by transformers or here."""
        from qlora_kit.formats.compressed.load import load_compressed
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_compressed(folder)

    def read_by(self, folder: Path) -> str:
        """The library, or the kit."""
        from qlora_kit.formats.compressed.load import is_unpacked_here

        return UNPACKED if is_unpacked_here(folder) else self.reader

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, REQUIRED, partial(group_problems, server=server))
