"""bitsandbytes, as the registry knows it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.contract_static import VLLM, quantized_problems
from qlora_kit.export.serving.commands import SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.bnb.server_files import REQUIRED, width_problems
from qlora_kit.formats.format import Format
from qlora_kit.formats.job import Source
from qlora_kit.schema.export import BnbTarget

if TYPE_CHECKING:
    from qlora_kit.export.fit.fault import LeftOver
    from qlora_kit.export.fit.form import ModelForm


class Bnb(Format[BnbTarget]):
    """bitsandbytes."""

    name = "bnb"
    group = "bnb"
    turn = 2
    is_made_by_layer = True
    reader = "transformers with bitsandbytes"
    hub = Hub("transformers", "quantized", ("bitsandbytes",))
    servers = (transformers("bitsandbytes"), replace(SERVE_VLLM, install=f"{SERVE_VLLM.install} bitsandbytes"))
    tried_in = (VLLM,)

    def problems(
        self, path: str, target: BnbTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What the library asks of a model that it has not."""
        from qlora_kit.formats.bnb.fit import bnb_problems

        return bnb_problems(path, target, form)

    def left(self, target: BnbTarget, form: "ModelForm") -> "LeftOver | None":
        """Experts."""
        from qlora_kit.export.fit.form import experts_left

        return experts_left(form)

    def write(self, source: Source, target: BnbTarget, out: Path) -> None:
        """Quantize."""
        from qlora_kit.formats.bnb.write import write_bnb

        write_bnb(source.merged, out, target)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return quantized_problems(folder, REQUIRED, width_problems)
