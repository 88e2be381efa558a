"""TensorBoard."""

from collections.abc import Mapping
from importlib import import_module

from qlora_kit.core.extras import require
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.tracking.service import Ending, Recorded


class TensorboardService:
    """Event files below the run directory."""

    rewinds = True
    id = "tensorboard"

    def __init__(self, config: TrackerConfig, run: Recorded) -> None:
        require("tensorboard", "tracker=tensorboard")
        folder = run.folder / "tensorboard"
        # TensorBoard hides the steps from `purge_step` on that earlier files of the folder hold.
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(
            str(folder), purge_step=run.kept_step + 1 if run.id else None
        )
        summaries = import_module("torch.utils.tensorboard.summary")
        experiment, started, self._ended = summaries.hparams(dict(run.parameters), {"loss": 0.0, "eval_loss": 0.0})
        if not run.id:
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(started)
            self._writer.add_text("recipe", "```yaml\n" + run.recipe + "\n```", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed process takes along what is not written

    def finish(self, ending: Ending) -> None:
        """Mark the run as it ended and close the file."""
        self._writer.add_text("ended", ending.value, 0)
        if ending is Ending.finished:
            self._writer.file_writer.add_summary(self._ended)
        self._writer.close()
