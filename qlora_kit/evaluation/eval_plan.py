"""What every artifact is asked by eval: the rows, prompts, texts and tasks, all found before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.encode import Encoder
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.harness import HarnessTasks, harness_tasks
from qlora_kit.evaluation.perplexity import text_windows
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import Task
from qlora_kit.schema.eval import EvalConfig


@dataclass(frozen=True)
class EvalPlan:
    """What every artifact is asked, and the first answers in words by artifact, as they come.

    Attributes:
        reference: name of the model that all are compared with.
    """

    rows: Sequence[TokenRow]
    prompts: list[list[int]]
    questions: list[str]
    expected: list[str]
    task: Task
    windows: Sequence[TokenRow]
    harness: HarnessTasks
    config: EvalConfig
    reference: str
    said: dict[str, list[str]] = field(default_factory=dict)


def build_eval_plan(
    run: Run, rows: Sequence[TokenRow], conversations: Sequence[Conversation], config: EvalConfig
) -> EvalPlan:
    """The questions of a recipe on held-out rows and conversations.

    Raises:
        RecipeError: the text file or a task of the harness is not there or cannot be used.
    """
    encoder, task = Encoder.of(run.tokenizer), run.task
    windows: list[TokenRow] = []
    if config.text_file is not None:
        _refuse_long_window(run.base.folder, config.text_window)
        place, size, stride = Path(config.text_file), config.text_window, config.text_stride
        windows = text_windows(place, run.tokenizer, encoder.bos, size, stride, config.text_windows)
    prompts = [(ids, row) for row in conversations if (ids := encoder.prompt_ids(row))]
    if len(prompts) < len(conversations):
        texts = counted(len(conversations) - len(prompts), "held-out row is a text", "held-out rows are texts")
        log.warning(f"{texts} without a prompt, so nothing answers them")
    return EvalPlan(
        rows=rows,
        prompts=[ids for ids, _ in prompts],
        questions=["\n".join(message.content for message in row.messages[-2:-1]) for _, row in prompts],
        expected=[row.messages[-1].content for _, row in prompts],
        task=task,
        windows=windows,
        harness=harness_tasks(config.lm_eval),
        config=config,
        reference=run.models[-1],
    )


def _refuse_long_window(base_folder: Path, window: int) -> None:
    """A model that reads more than it was made for answers nonsense, and says nothing about it."""
    path = base_folder / "config.json"
    longest = read_json(path).get("max_position_embeddings") if path.is_file() else None
    if isinstance(longest, int) and window > longest:
        what = f"eval.text_window={window} is more than the {longest} positions that this base was made for"
        raise RecipeError(what, "eval.text_window", f"eval.text_window={longest}")
