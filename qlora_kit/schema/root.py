"""The three recipes: what a command line composes to."""

from dataclasses import dataclass

from qlora_kit.schema.data import DataConfig, LaterRows
from qlora_kit.schema.engine import EngineConfig
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.field import Sealed, setting
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

    name: str = setting("run", "Folder below outputs/; the experiment's name unless set.")
    debug: bool = setting(False, "Show tracebacks.")
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    quant: QuantConfig = setting(QuantConfig(), "Quantization of the frozen base.")
    lora: LoraConfig = setting(LoraConfig(), "The adapter.")
    data: DataConfig = setting(DataConfig(), "Training and held-out rows.")
    optim: OptimConfig = setting(OptimConfig(), "Optimizer and schedule.")
    trainer: TrainerConfig = setting(TrainerConfig(), "The training loop.")
    engine: EngineConfig = setting(EngineConfig(), "How a step is run.")
    tracker: TrackerConfig = setting(TrackerConfig(), "Where metrics go.")
    sweep: SweepConfig = setting(SweepConfig(), "Ranking and placement of multirun jobs.")
    exports: list[str] = setting(
        [],
        "What the run is to become: options of the group export, such as gguf_q4_k_m. Checked against the base before "
        "training, and what `qlora-kit export` writes unless told otherwise.",
    )


@dataclass
class ExportRecipe(Sealed):
    """`qlora-kit export`."""

    run: str | None = setting(None, "A run directory, or latest; latest unless base is given.")
    base: str | None = setting(
        None, "Instead of a run, quantize a base model: a folder, a hub id, an option of model, or demo."
    )
    revision: str | None = setting(None, "base: commit or tag of a hub id; its newest commit unless set.")
    out: str | None = setting(None, "base: folder that gets exports/; outputs/<base>/<time> unless set.")
    debug: bool = setting(False, "Show tracebacks.")
    data: DataConfig = setting(
        DataConfig(), "base: rows to calibrate and score on, or general text; run: eval_file alone."
    )
    export: ExportConfig = setting(ExportConfig(), "What to merge into, and the files to write.")


@dataclass
class EvalRecipe(Sealed):
    """`qlora-kit eval`."""

    run: str | None = setting(None, "A run directory, or latest; latest unless base is given.")
    base: str | None = setting(
        None, "Instead of a run, exports of a base: their folder, the base that export was given, or latest."
    )
    debug: bool = setting(False, "Show tracebacks.")
    data: LaterRows = setting(LaterRows(), "run: held-out rows given now, for a run without any or instead of its own.")
    eval: EvalConfig = setting(EvalConfig(), "What is scored, on how many rows.")


RECIPE_OF_VERB: dict[str, type[Sealed]] = {"train": TrainRecipe, "export": ExportRecipe, "eval": EvalRecipe}
