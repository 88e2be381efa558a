"""GGUF, as the registry knows it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import Problem
from qlora_kit.evaluation.servers.requirements import OLLAMA
from qlora_kit.export.serving.facts import Hub, ServingFacts
from qlora_kit.formats.format import Format
from qlora_kit.formats.gguf.server_files import server_file_problems
from qlora_kit.formats.gguf.serving import SERVERS
from qlora_kit.formats.job import ExportJob, ExportSource, Written, settings_of
from qlora_kit.schema.export import ExportConfig, GgufMix, GgufTarget

if TYPE_CHECKING:
    from qlora_kit.evaluation.scores import Scorer
    from qlora_kit.evaluation.token_parity.compare import TokenParity, Trained
    from qlora_kit.export.budget.choose import Formats
    from qlora_kit.export.checks.fault import Unquantized
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.formats.format import ChatStream
    from qlora_kit.formats.gguf.converter.convert import Conversion
    from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
    from qlora_kit.weights.reader import WeightReader


class Gguf(Format[GgufTarget]):
    """GGUF."""

    name = "gguf"
    usual = "gguf_q4_k_m"
    group = "gguf"
    order = 3
    reader = "llama.cpp"
    hub = Hub("gguf", "quantized", ("gguf", "llama.cpp"))
    servers = SERVERS
    checked_servers = (OLLAMA,)
    reads_every_weight = False  # llama.cpp's converter has orders of its own

    def problems(
        self, path: str, target: GgufTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What llama.cpp and its block formats ask of a model that it has not."""
        from qlora_kit.formats.gguf.checks import gguf_problems

        return gguf_problems(path, target, form)

    def unquantized(self, target: GgufTarget, form: "ModelForm") -> "Unquantized | None":
        """Matrices whose rows no block divides."""
        from qlora_kit.formats.gguf.checks import gguf_unquantized

        return gguf_unquantized(target, form)

    def layer_formats(self, target: GgufTarget, shapes: Mapping[str, tuple[int, int]]) -> "Formats":
        """The block types of each layer."""
        from qlora_kit.formats.gguf.budget import GgufFormats

        return GgufFormats(target, {}, shapes, {})

    def with_shared(self, target: GgufTarget, export: ExportConfig) -> GgufTarget:
        """The target with the shared budget of bits, where it has none of its own."""
        return replace(target, bits_budget=export.bits_budget) if target.bits_budget is None else target

    def jobs(self, source: ExportSource) -> Callable[[str, GgufTarget], ExportJob]:
        """Jobs that share one importance matrix and one conversion, made when the first one needs them."""
        from qlora_kit.formats.gguf.converter.convert import Conversion
        from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
        from qlora_kit.formats.gguf.target import gguf_file_name

        conversion = Conversion(source.merged, source.merged.parent)
        imatrix = ImportanceMatrix(source.merged, source.calibration, conversion)

        def job(name: str, target: GgufTarget) -> ExportJob:
            file = gguf_file_name(source.merged, target, source.name, conversion)
            write = partial(_write, source, target, imatrix, conversion)
            return ExportJob(name, self.name, file, settings_of(target), write)

        return job

    def open(self, path: Path, pad_token_id: int, base: Path | None = None) -> "Scorer":
        """llama.cpp's own reading of the file."""
        from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
        from qlora_kit.formats.gguf.scorer import LlamaCppScorer

        return LlamaCppScorer(LlamaCppModel(path))

    def open_chat(self, path: Path) -> "ChatStream":
        """llama.cpp, with the tokenizer that lies beside the exports."""
        from qlora_kit.formats.gguf.chat import open_gguf_chat

        return open_gguf_chat(path)

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader":
        """A reader of the weights that the file stands for."""
        from qlora_kit.formats.gguf.weights import gguf_weights

        return gguf_weights(artifact, merged)

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Bits of the mix."""
        number = re.search(r"Q(\d+)_|F(\d+)$", str(settings.get("mix")))
        return int(number[1] or number[2]) if number else None

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """An importance matrix, then mixes of more bits."""
        mixes = [mix.value for mix in GgufMix]  # more bits first
        mix = str(settings.get("mix"))
        at = mixes.index(mix) if mix in mixes else len(mixes)
        larger = [name for name in ("Q6_K", "Q8_0") if mixes.index(name) < at]
        if not larger:
            return () if mix in ("F16", "BF16") else ("16 bits (gguf_f16)",)
        more = f"more bits ({', '.join(f'gguf_{name.lower()}' for name in larger)})"
        return (more,) if settings.get("imatrix") else ("an importance matrix (imatrix: true)", more)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What Ollama would refuse."""
        return server_file_problems(folder, folder / file)

    def check_tokens(self, contract: "TokenParity", trained: "Trained", folder: Path, file: str) -> None:
        """Compare llama.cpp, and the Modelfile beside the file, with the trained tokenizer."""
        from qlora_kit.evaluation.token_parity.compare import compare_all
        from qlora_kit.evaluation.token_parity.folder import TRANSFORMERS, reading_of
        from qlora_kit.formats.gguf.token_parity import check_gguf

        compare_all(contract, trained, TRANSFORMERS, reading_of(trained.tokenizer))
        check_gguf(contract, trained, folder, folder / file)

    def write_server_files(self, folder: Path, facts: ServingFacts) -> list[str]:
        """Write the Modelfile."""
        from qlora_kit.formats.gguf.modelfile import write_modelfile

        return [write_modelfile(folder, facts)]


def _write(
    source: ExportSource, target: GgufTarget, imatrix: "ImportanceMatrix", conversion: "Conversion", out: Path
) -> Written:
    from qlora_kit.formats.gguf.budget import allocate_gguf
    from qlora_kit.formats.gguf.target import write_gguf_target

    spent = None
    if target.bits_budget is not None:
        target, spent = allocate_gguf(source.merged, target, target.bits_budget, imatrix)
    return Written(spent, write_gguf_target(source.merged, target, source.name, imatrix, out, conversion))
