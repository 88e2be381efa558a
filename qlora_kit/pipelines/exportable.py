"""What an export is of, as the pipeline sees it: a trained run here, a base that was never trained beside it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from qlora_kit.core.console.lines import log
from qlora_kit.core.units import counted, human_bytes, human_seconds
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Scorer
from qlora_kit.evaluation.trained import open_trained
from qlora_kit.export.calibration import calibration_rows
from qlora_kit.export.merge import MergeReport, merge
from qlora_kit.export.serving.facts import BaseFacts
from qlora_kit.formats.job import ExportJob, settings_of
from qlora_kit.formats.registry import asked_for
from qlora_kit.pipelines.opened_run import OpenedRun
from qlora_kit.pipelines.survival import record, survival
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.export import ExportConfig, MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind

MERGED = ".merged."  # begins the name of a folder of 16-bit weights that files are made from


@dataclass(frozen=True)
class ExportRows:
    """What an export looks at.

    Attributes:
        calibration: token ids for the formats that look at activations.
        scored: held-out rows on which each file is compared; none where there are none.
        origin: what they are and where they come from, for the record.
    """

    calibration: list[list[int]]
    scored: Sequence[TokenRow]
    origin: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Exportable(ABC):
    """What is exported.

    Attributes:
        directory: its `exports/` gets a folder for each file.
        base: the base model, or the one that was trained.
        name: first part of the name of a file that holds a whole model.
        seed: of every draw.
    """

    directory: RunDirectory
    base: BaseFacts
    tokenizer: Any
    name: str
    seed: int

    kind: ClassVar[str]
    """A word for it."""
    reference: ClassVar[str]
    """What its files are compared with, in words."""

    @property
    @abstractmethod
    def trained(self) -> RunDirectory | None:
        """The run that trained it; None for a base that was never trained."""

    @property
    @abstractmethod
    def holds_out(self) -> bool:
        """Whether there are rows to score on; read from the recipe, so nothing is prepared for it."""

    @property
    def unmeasured(self) -> str:
        """Why its files are not measured, in words."""
        return f"this {self.kind} has no held-out rows, so nothing tells how close a file is to {self.reference}"

    @abstractmethod
    def rows(self, config: ExportConfig) -> ExportRows:
        """The rows to calibrate on, and others to score on."""

    @abstractmethod
    def begin(self, rows: ExportRows) -> None:
        """Note what is about to be exported; called by the one export that is at work on it."""

    @abstractmethod
    def open_reference(self) -> tuple[Scorer, Scorer | None]:
        """What its files are compared with, and the base before training, where there was any."""

    @abstractmethod
    def merge_bases(self, config: ExportConfig) -> list[MergeBase]:
        """The 16-bit models that files are made from, of which the better one is kept."""

    @abstractmethod
    def base_for(self, rounds_to: str | None) -> MergeBase:
        """What a file is made from by `export.merge_base=auto`, `rounds_to` being the `quant.kind` it rounds to."""

    @abstractmethod
    def write_sixteen_bit(self, merge_base: MergeBase, out: Path) -> MergeReport:
        """Fill an empty folder with one of them, and say so."""

    @abstractmethod
    def survival(self, job: ExportJob, folder: Path, merged: Path, merge: MergeReport) -> dict[str, object]:
        """The manifest's entry on what is left of what was learned."""


@dataclass(frozen=True)
class TrainedRun(Exportable):
    """A finished run: base and adapter."""

    quant: QuantConfig
    opened: OpenedRun

    kind: ClassVar[str] = "run"
    reference: ClassVar[str] = "the trained model"

    @classmethod
    def of(cls, opened: OpenedRun) -> "TrainedRun":
        """An opened run as something to export."""
        recipe = opened.recipe
        base = BaseFacts(recipe.model.source, opened.base_folder, recipe.model.revision)
        return cls(opened.directory, base, opened.tokenizer, recipe.name, recipe.trainer.seed, recipe.quant, opened)

    @property
    def trained(self) -> RunDirectory:
        """The run directory."""
        return self.directory

    @property
    def holds_out(self) -> bool:
        """Whether the recipe holds rows out, or some are given now."""
        return self.opened.holds_out

    def rows(self, config: ExportConfig) -> ExportRows:
        """The run's own rows: trained ones and general text to calibrate on, held-out ones to score on."""
        data = self.opened.rows()
        calibration = calibration_rows(
            data.train,
            config.calibration_rows,
            held_out=data.held_out,
            tokenizer=self.tokenizer,
            general_share=config.calibration_general,
            seed=self.seed,
        )
        return ExportRows(calibration, data.scored(config.score_rows))

    def begin(self, rows: ExportRows) -> None:
        """Nothing: the run has its record."""

    def open_reference(self) -> tuple[Scorer, Scorer | None]:
        """Base and adapter as they were trained, and the base alone."""
        return open_trained(self.base.folder, self.directory.adapter, self.quant, int(self.tokenizer.pad_token_id))

    def merge_bases(self, config: ExportConfig) -> list[MergeBase]:
        """What the adapter is merged into; of several, `base_for` chooses for each file or the scores do."""
        if config.merge_base is MergeBase.auto:
            wanted = {self.base_for(one.format.rounds_to(settings_of(one.target))) for one in asked_for(config)}
            return [base for base in (MergeBase.dequantized, MergeBase.original) if base in wanted]
        if config.merge_base is not MergeBase.measure:
            return [config.merge_base]
        if self.quant.kind is QuantKind.none:
            return [MergeBase.original]  # it was trained on the 16-bit base: there is one candidate
        return [MergeBase.dequantized, MergeBase.original]

    def base_for(self, rounds_to: str | None) -> MergeBase:
        """What a file is made from by `export.merge_base=auto`.

        The values of a base in 4 or 8 bit are those that the same format rounds to, so most of an update that is added
        to them and rounded again falls back to the base.

        Args:
            rounds_to: the `quant.kind` whose values the file rounds to; None for a grid of its own.
        """
        return MergeBase.original if rounds_to == self.quant.kind.value else MergeBase.dequantized

    def write_sixteen_bit(self, merge_base: MergeBase, out: Path) -> MergeReport:
        """Merge the adapter."""
        began = time.perf_counter()
        report = merge(self.base.folder, self.directory.adapter, self.quant, merge_base, self.tokenizer, out)
        seconds = human_seconds(time.perf_counter() - began)
        before = f", {human_bytes(report.resumed)} of it written before" if report.resumed else ""
        modules = f"{report.merged:,} of {counted(report.adapted, 'module')}"
        log.info(f"merged {modules} into the {report.base} base in {seconds}{before}")
        return report

    def survival(self, job: ExportJob, folder: Path, merged: Path, merge: MergeReport) -> dict[str, object]:
        """How much of the adapter's update the file's rounding left."""
        return record(survival(job, folder, merged, merge, self.directory.adapter))
