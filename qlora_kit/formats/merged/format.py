"""The merged model in 16 bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_kit.evaluation.servers.requirements import sixteen_bit_problems
from qlora_kit.export.serving.commands import SERVE_SGLANG, SERVE_VLLM, transformers
from qlora_kit.export.serving.facts import Hub
from qlora_kit.formats.format import Format
from qlora_kit.formats.job import ExportSource
from qlora_kit.schema.export import MergedTarget


class Merged(Format[MergedTarget]):
    """A safetensors folder in 16 bit."""

    name = "merged"
    usual = "merged_16bit"
    group = "merged"
    order = 1
    reader = "transformers"
    hub = Hub("transformers", "finetune")
    servers = (transformers("accelerate"), SERVE_VLLM, SERVE_SGLANG)

    def write(self, source: ExportSource, target: MergedTarget, out: Path) -> None:
        """Copy the merged folder."""
        shutil.copytree(source.merged, out, dirs_exist_ok=True)

    def load(self, folder: Path) -> Any:
        """The model, in 16 or 32 bit by the device."""
        from qlora_kit.evaluation.sixteen_bit import load_sixteen_bit
        from qlora_kit.model.load import quiet_libraries

        quiet_libraries()
        return load_sixteen_bit(folder)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in the folder."""
        return sixteen_bit_problems(folder)
