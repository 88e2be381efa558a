"""Both forms of an adapter, as the registry knows them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.adapter.saved import CONFIG
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.export.checks.fault import ELSEWHERE
from qlora_kit.export.serving.facts import Hub, ServingFacts
from qlora_kit.export.serving.markdown import code
from qlora_kit.formats.adapter.server_files import adapter_problems
from qlora_kit.formats.adapter.serving import GGUF_SERVERS, SERVERS
from qlora_kit.formats.format import Format
from qlora_kit.formats.job import ExportJob, ExportSource, settings_of
from qlora_kit.schema.export import AdapterFormat, AdapterTarget

if TYPE_CHECKING:
    from qlora_kit.evaluation.scores import Scorer
    from qlora_kit.evaluation.token_parity.compare import TokenParity, Trained
    from qlora_kit.export.checks.form import ModelForm


class _Alone(Format[AdapterTarget]):
    """An adapter in either form."""

    group = "adapter"
    order = 0
    needs_base = True
    form: ClassVar[AdapterFormat]

    def accepts(self, target: AdapterTarget) -> bool:
        """Whether it has this form."""
        return target.format is self.form

    def problems(
        self, path: str, target: AdapterTarget, form: "ModelForm", adapter: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """What servers of adapters have no place for."""
        from qlora_kit.formats.adapter.checks import refuse_unfit

        try:
            refuse_unfit(target, form, adapter)
        except RecipeError as error:
            yield from (Problem(problem.what, path, ELSEWHERE) for problem in error.problems)

    def jobs(self, source: ExportSource) -> Callable[[str, AdapterTarget], ExportJob]:
        """Jobs that copy or convert what was trained."""

        def job(name: str, target: AdapterTarget) -> ExportJob:
            file = self.file_name(source)
            return ExportJob(name, self.name, file, settings_of(target), partial(_write, source, target, file))

        return job

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """It is written as it was trained; what differs is the base that it stands beside."""
        return ("a merged file, which stands beside no other base (export=merged_16bit)",)

    def load(self, folder: Path) -> Any:
        """Refused: it is no model by itself."""
        raise _no_base()

    def file_name(self, source: ExportSource) -> str:
        """The path inside the folder that a reader opens."""
        return "."


class Adapter(_Alone):
    """peft's form, for Python servers."""

    name = "adapter"
    usual = "adapter_peft"
    form = AdapterFormat.peft
    reader = "peft"
    hub = Hub("peft", "adapter", ("lora",))
    servers = SERVERS

    def open(self, path: Path, pad_token_id: int, base: Path | None = None) -> "Scorer":
        """peft's reading of the folder, on the base."""
        if base is None:
            raise _no_base()
        from qlora_kit.formats.adapter.open import open_peft

        return open_peft(path, base, pad_token_id)

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server of LoRA would refuse in the folder."""
        return adapter_problems(folder)

    def serving_note(self, facts: ServingFacts) -> str:
        """Where the lines look for the base, and what peft alone makes of it; a hub's name is found by itself."""
        told = _told_of_peft(facts)
        if facts.base.hub_id:
            return told
        shown = code(facts.base.shown)
        return f" vLLM and SGLang look for the base's folder, {shown}, here too: put it here, or change its path.{told}"


class GgufAdapter(_Alone):
    """A GGUF file, for llama.cpp and Ollama."""

    name = "adapter_gguf"
    form = AdapterFormat.gguf
    reader = "llama.cpp"
    hub = Hub("gguf", "adapter", ("gguf", "lora", "llama.cpp"))
    servers = GGUF_SERVERS
    checked_servers = ()

    def open(self, path: Path, pad_token_id: int, base: Path | None = None) -> "Scorer":
        """llama.cpp's reading of the file, on the base as a GGUF file."""
        if base is None:
            raise _no_base()
        from qlora_kit.formats.adapter.open import open_gguf_adapter

        return open_gguf_adapter(path, base)

    def file_name(self, source: ExportSource) -> str:
        """The GGUF file."""
        return f"{source.name}.adapter.gguf"

    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """None is asked."""
        yield from ()

    def check_tokens(self, contract: "TokenParity", trained: "Trained", folder: Path, file: str) -> None:
        """Note that there is nothing to compare."""
        contract.notes.append("a GGUF adapter has no tokenizer of its own: its base's GGUF file decides")

    def serving_note(self, facts: ServingFacts) -> str:
        """Where the lines look for the base."""
        return " The base as a GGUF file, `base.gguf`, is looked for here too: put it here, or change its path."

    def write_server_files(self, folder: Path, facts: ServingFacts) -> list[str]:
        """Write the Modelfile."""
        from qlora_kit.formats.gguf.modelfile import write_modelfile

        return [write_modelfile(folder, facts, base="./base.gguf")]


def _told_of_peft(facts: ServingFacts) -> str:
    from qlora_kit.adapter.plain_peft import told_of_plain_peft

    if facts.run is None:
        return ""
    kind = str(read_json(facts.base.folder / "config.json").get("model_type", ""))
    told = told_of_plain_peft(read_json(facts.run.adapter / CONFIG), kind)
    return f" {told[0].upper()}{told[1:]}." if told else ""


def _no_base() -> RecipeError:
    return RecipeError("an adapter is read beside its base, and none is at hand", fix="qlora-kit chat <run directory>")


def _write(source: ExportSource, target: AdapterTarget, file: str, out: Path) -> None:
    from qlora_kit.formats.adapter.write import write_adapter

    write_adapter(source.adapter, source.merged, out, target, source.base, file)
