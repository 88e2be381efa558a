"""What the kit knows of an export format, in one class; each format's folder holds one for each form that it has."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.evaluation.servers.requirements import SGLANG, VLLM
from qlora_kit.export.serving.commands import TRANSFORMERS, ServeCommand, Served, Server
from qlora_kit.export.serving.facts import Hub, ServingFacts
from qlora_kit.formats.job import ExportJob, ExportSource, Written, settings_of
from qlora_kit.schema.export import ExportConfig

if TYPE_CHECKING:
    from qlora_kit.evaluation.scores import Scorer
    from qlora_kit.evaluation.token_parity.compare import TokenParity, Trained
    from qlora_kit.export.budget.choose import Formats
    from qlora_kit.export.checks.fault import Unquantized
    from qlora_kit.export.checks.form import ModelForm
    from qlora_kit.weights.reader import WeightReader

Target = TypeVar("Target")
# A reader, where no library reads a model of its kind right.
UNPACKED = "transformers, the weights unpacked by qlora-kit"
ChatStream = Callable[[list[dict[str, str]], int], Iterator[str]]  # messages, and the most tokens of an answer


class Format(ABC, Generic[Target]):
    """An export format. Asking it imports neither torch nor transformers; only what works on weights does."""

    name: ClassVar[str]
    """As manifests and cards have it."""
    usual: ClassVar[str] = ""
    """The option of the recipe group `export` that it is mostly written as; empty where it is no usual choice."""
    group: ClassVar[str]
    """The field of `ExportConfig` that holds its targets."""
    order: ClassVar[int]
    """When it is written: quick ones first."""
    reader: ClassVar[str]
    """What scores it here, as a user would load it."""
    hub: ClassVar[Hub]
    """How a hub files it."""
    servers: ClassVar[tuple[Server, ...]]
    """Those that a card has lines for."""
    checked_servers: ClassVar[tuple[str, ...]] = (VLLM, SGLANG)
    """Servers in which a file is tried where they are installed, and held against their rules where they are not."""
    compiles: ClassVar[str] = ""
    """What a C++ compiler is wanted for, in words; empty for nothing."""
    needs_base: ClassVar[bool] = False
    """Whether it is no model by itself but is loaded beside its base."""

    is_calibrated: ClassVar[bool] = False
    """Whether rows are read for it, whatever its settings."""
    is_made_by_layer: ClassVar[bool] = False
    """Whether it is made of the linear layers of a model, one by one."""
    maps_names: ClassVar[bool] = False
    """Whether it finds these layers in a folder that has other names for them than the model."""
    reads_every_weight: ClassVar[bool] = True
    """Whether every weight of a file is read back; where not, those that are not are told."""

    def accepts(self, target: Target) -> bool:
        """Whether a target of its group is written in this form."""
        return True

    def group_size(self, target: Target) -> int | None:
        """Weights that share a scale, where that must divide every layer's inputs; -1 for a whole row."""
        return None

    def problems(self, path: str, target: Target, form: "ModelForm", adapter: Mapping[str, Any]) -> Iterator[Problem]:
        """What cannot be written of a model, with the line that mends it; asked before a weight is loaded.

        Args:
            path: of the target, such as `export.merged.merged_16bit`.
            adapter: settings of the trained adapter; empty for a base model.
        """
        yield from ()

    def unquantized(self, target: Target, form: "ModelForm") -> "Unquantized | None":
        """Layers that stay in 16 bit by the format's limits."""
        return None

    def layer_formats(self, target: Target, shapes: Mapping[str, tuple[int, int]]) -> "Formats":
        """What a target with a budget of bits leaves open in a model's layers; only asked where budgets are possible.

        Args:
            shapes: (out_features, in_features) of each linear layer, by name.
        """
        raise NotImplementedError(f"a file of the format {self.name} has one number of bits")

    def with_shared(self, target: Target, export: ExportConfig) -> Target:
        """The target with what the recipe says for all files."""
        return target

    def jobs(self, source: ExportSource) -> Callable[[str, Target], ExportJob]:
        """What makes a job of a target and its name; targets of one source may share what is costly to measure."""

        def job(name: str, target: Target) -> ExportJob:
            return ExportJob(name, self.name, ".", settings_of(target), partial(self.write, source, target))

        return job

    def write(self, source: ExportSource, target: Target, out: Path) -> Written | None:
        """Fill an empty folder; returns how, where there is something to say."""
        raise NotImplementedError(f"the jobs of {self.name} write by themselves")

    def rounds_to(self, settings: Mapping[str, object]) -> str | None:
        """The `quant.kind` of a base whose values this file rounds to; None for a grid of its own.

        Args:
            settings: the target's fields.
        """
        return None

    def open(self, path: Path, pad_token_id: int, base: Path | None = None) -> "Scorer":
        """A scorer of an artifact, read as a user of it would.

        Args:
            path: the file or folder that the reader opens.
            base: folder of the base, in 16 bit or as bitsandbytes stores it; only what is beside its base looks at it.

        Raises:
            RecipeError: an adapter without a base, or a package of its reader is not installed.
            RunError: the reader cannot load the artifact.
        """
        from qlora_kit.evaluation.torch_scorer import TorchScorer

        return TorchScorer(self.load(path), pad_token_id)

    def read_by(self, folder: Path) -> str:
        """What `open` reads an artifact with, in words."""
        return self.reader

    def load(self, folder: Path) -> Any:
        """An artifact as a transformers model, where it can be one by itself.

        Raises:
            RecipeError: it cannot.
            RunError: the reader cannot load the folder.
        """
        raise RecipeError(f"transformers loads no file of the format '{self.name}'")

    def open_chat(self, path: Path) -> "ChatStream | None":
        """What answers token by token; None where that is the transformers model."""
        return None

    def dequantized_weights(self, artifact: Path, merged: Path) -> "WeightReader | None":
        """A reader of the weights that an artifact stands for, float32 [out_features, in_features], by the merged name.

        None for a format whose weights are not read back one by one.

        Args:
            artifact: what a reader opens: a file (of several, the first), or the folder.
            merged: the 16-bit folder that it was made from.
        """
        return None

    def weight_bits(self, settings: Mapping[str, object]) -> int | None:
        """Whole bits of a weight; None where RTN to as many is no baseline.

        Args:
            settings: the target's fields.
        """
        return None

    def remedies(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """What keeps more of an update, from the nearest on: never what the file has already.

        Args:
            settings: the target's fields.
        """
        return ("more bits",)

    def serve_commands(self, served: Served) -> list[ServeCommand]:
        """The servers that read it, with the lines to paste."""
        reads = [one for one in self.servers if not (served.is_unpacked and one.name == TRANSFORMERS)]
        return [server.command(served) for server in reads]

    @abstractmethod
    def server_problems(self, server: str, folder: Path, file: str) -> Iterator[str]:
        """What a server would refuse in an artifact's own files.

        Args:
            server: of `checked_servers`.
            file: the path inside the folder that a reader opens.
        """

    def check_tokens(self, contract: "TokenParity", trained: "Trained", folder: Path, file: str) -> None:
        """Add what its readers see otherwise than training did; of most, what transformers makes of the folder."""
        from qlora_kit.evaluation.token_parity.folder import compare_folder

        compare_folder(contract, trained, folder)

    def serving_note(self, facts: ServingFacts) -> str:
        """What the lines of a card look for beside the files; empty for nothing."""
        return ""

    def write_server_files(self, folder: Path, facts: ServingFacts) -> list[str]:
        """Write what its servers need beside the file; returns the names."""
        return []
