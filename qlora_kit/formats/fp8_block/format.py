"""FP8 blocks, as the registry knows them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import Required, quantized_problems
from qlora_kit.export.serving.commands import SERVE_SGLANG, SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.format import UNPACKED, Format
from qlora_kit.formats.fp8_block import BLOCK, METHOD
from qlora_kit.formats.job import ExportSource
from qlora_kit.schema.export import Fp8BlockTarget

if TYPE_CHECKING:
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.weights.reader import WeightReader

_REQUIRED = (
    Required(("quant_method",), (METHOD,)),
    Required(("activation_scheme",), ("dynamic",)),
    Required(("weight_block_size",), ([BLOCK, BLOCK],)),
)


class Fp8Block(Format[Fp8BlockTarget]):
    """FP8 in blocks."""

    name = "fp8_block"
    group = "fp8_block"
    order = 2
    is_made_by_layer = True
    reader = "transformers, its activations rounded as servers round them"
    hub = Hub("transformers", "quantized", ("fp8",))
    servers = (transformers("accelerate"), SERVE_VLLM, SERVE_SGLANG)

    def problems(
        self, path: str, target: Fp8BlockTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """Layers that blocks do not fill, experts that lie as no reader knows them, and layers of no block."""
        from qlora_kit.formats.fp8_block.checks import fp8_block_problems

        return fp8_block_problems(path, form)

    def write(self, source: ExportSource, target: Fp8BlockTarget, out: Path) -> None:
        """Round, tensor by tensor."""
        from qlora_kit.formats.fp8_block.write import write_fp8_block

        write_fp8_block(source.merged, out)

    def load(self, folder: Path) -> Any:
        """The model, its weights unpacked."""
        from qlora_kit.formats.fp8_block.load import load_fp8_block
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_fp8_block(folder)

    def read_by(self, folder: Path) -> str:
        """The library, or the kit."""
        from qlora_kit.formats.fp8_block.load import is_unpacked_here

        return UNPACKED if is_unpacked_here(folder) else self.reader

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader":
        """A reader of the weights that the folder stands for."""
        from qlora_kit.formats.fp8_block.load import fp8_block_weights

        return fp8_block_weights(artifact)

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """16 bits: there is one number of bits."""
        return ("a 16-bit folder (merged_16bit)",)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, _REQUIRED)
