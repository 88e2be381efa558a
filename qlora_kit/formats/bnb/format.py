"""bitsandbytes, as the registry knows it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import VLLM, quantized_problems
from qlora_kit.export.serving.commands import SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.bnb.server_files import REQUIRED, width_problems
from qlora_kit.formats.format import Format
from qlora_kit.formats.job import ExportSource
from qlora_kit.schema.export import BnbTarget

if TYPE_CHECKING:
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.weights.reader import WeightReader

_WEIGHT_BITS = {"nf4": 4, "int8": 8}


class Bnb(Format[BnbTarget]):
    """bitsandbytes."""

    name = "bnb"
    usual = "bnb_nf4"
    group = "bnb"
    order = 2
    is_made_by_layer = True
    reader = "transformers with bitsandbytes"
    hub = Hub("transformers", "quantized", ("bitsandbytes",))
    servers = (transformers("bitsandbytes"), replace(SERVE_VLLM, install=f"{SERVE_VLLM.install} bitsandbytes"))
    checked_servers = (VLLM,)

    def problems(
        self, path: str, target: BnbTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What the library asks of a model that it has not."""
        from qlora_kit.formats.bnb.checks import bnb_problems

        return bnb_problems(path, form)

    def write(self, source: ExportSource, target: BnbTarget, out: Path) -> None:
        """Quantize."""
        from qlora_kit.formats.bnb.write import write_bnb

        write_bnb(source.merged, out, target)

    def rounds_to(self, settings: Mapping[str, object]) -> str | None:
        """Its own kind: the values of a base in that format would be rounded to themselves, the update away."""
        return str(settings["kind"])

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader":
        """A reader of the weights that the folder stands for."""
        from qlora_kit.formats.bnb.weights import bnb_weights

        return bnb_weights(artifact)

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Bits of the kind."""
        return _WEIGHT_BITS.get(str(settings.get("kind")))

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """More bits."""
        return ("int8 (bnb_int8)",) if settings.get("kind") == "nf4" else ("a 16-bit folder (merged_16bit)",)

    def load(self, folder: Path) -> Any:
        """The model, its weights as they are stored."""
        from qlora_kit.formats.bnb.load import load_bnb
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_bnb(folder)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, REQUIRED, width_problems)
