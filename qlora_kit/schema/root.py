"""The three recipes: what a command line composes to."""

from dataclasses import dataclass

from qlora_kit.schema.data import DataConfig, LaterRows
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.field import Sealed, knob
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.schema.sweep import SweepConfig
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.schema.trainer import TrainerConfig


@dataclass
class TrainRecipe(Sealed):
    """`qlora-kit train`."""

    name: str = knob("run", "Folder below outputs/; the experiment's name unless set.")
    debug: bool = knob(False, "Show tracebacks.")
    model: ModelConfig = knob(ModelConfig(), "The base model.")
    quant: QuantConfig = knob(QuantConfig(), "Quantization of the frozen base.")
    lora: LoraConfig = knob(LoraConfig(), "The adapter.")
    data: DataConfig = knob(DataConfig(), "Training and held-out rows.")
    optim: OptimConfig = knob(OptimConfig(), "Optimizer and schedule.")
    trainer: TrainerConfig = knob(TrainerConfig(), "The training loop.")
    engine: EngineConfig = knob(EngineConfig(), "How a step is run.")
    tracker: TrackerConfig = knob(TrackerConfig(), "Where metrics go.")
    sweep: SweepConfig = knob(SweepConfig(), "Ranking and placement of multirun jobs.")


@dataclass
class ExportRecipe(Sealed):
    """`qlora-kit export`."""

    run: str | None = knob(None, "A run directory, or latest; latest unless base is given.")
    base: str | None = knob(
        None, "Instead of a run, quantize a base model: a folder, a hub id, an option of model, or demo."
    )
    revision: str | None = knob(None, "base: commit or tag; required for a hub id.")
    out: str | None = knob(None, "base: folder that gets exports/; outputs/<base>/<time> unless set.")
    debug: bool = knob(False, "Show tracebacks.")
    data: DataConfig = knob(
        DataConfig(), "base: rows to calibrate and score on, or general text; run: eval_file alone."
    )
    export: ExportConfig = knob(ExportConfig(), "What to merge into, and the files to write.")


@dataclass
class EvalRecipe(Sealed):
    """`qlora-kit eval`."""

    run: str | None = knob(None, "A run directory, or latest; latest unless base is given.")
    base: str | None = knob(
        None, "Instead of a run, exports of a base: their folder, the base that export was given, or latest."
    )
    debug: bool = knob(False, "Show tracebacks.")
    data: LaterRows = knob(LaterRows(), "run: held-out rows given now, for a run without any or instead of its own.")
    eval: EvalConfig = knob(EvalConfig(), "What is scored, on how many rows.")


RECIPE_OF_VERB: dict[str, type[Sealed]] = {"train": TrainRecipe, "export": ExportRecipe, "eval": EvalRecipe}
