"""Which rows an export calibrates on, and which it and eval score on; general text where a base has none of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.tokens import TokenRow
from qlora_kit.export.calibration import calibration_rows
from qlora_kit.export.general_text import general_rows
from qlora_kit.runs.run import Run
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.root import ExportRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERAL_TEXT = "general text of the kit"
GENERAL_TOKENS = 128  # of a row: the text is short, and few long rows would see few kinds of it
MOST_SCORED = 1 / 3  # share of the general text that is scored on
_ALL = 1_000_000


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
class EvalRows:
    """Rows to score on, and the conversations whose last answer a model may give."""

    scored: Sequence[TokenRow]
    conversations: list[Conversation]


def rows_of_export(run: Run, config: ExportConfig) -> ExportRows:
    """Training rows and some general text to calibrate on, held-out rows to score on.

    Raises:
        RecipeError: the rows cannot be used.
    """
    if not run.has_rows:
        return rows_of_general_text(config, run.tokenizer, run.seed)
    data = run.rows()
    calibration = calibration_rows(
        data.train,
        config.calibration_rows,
        held_out=data.held_out,
        tokenizer=run.tokenizer,
        general_share=config.general_text_share,
        seed=run.seed,
    )
    scored = data.scored(config.score_rows)
    if not run.trained:
        rows = counted(len(calibration), "row")
        log.info(f"calibrating on {rows} of data, with export.general_text_share of them general text")
    return ExportRows(calibration, scored, {"calibration": "rows of data", **asdict(data.summary)})


def rows_of_eval(run: Run, config: EvalConfig, asked: int | None) -> EvalRows:
    """Held-out rows, `eval.kl_rows` of them, and `asked` conversations, all of them for None.

    Of a base without rows of its own the rows are the part of the general text that its export scored on.

    Raises:
        RecipeError: there are none, or they are other rows than they were.
    """
    if isinstance(run.recipe, ExportRecipe) and not run.has_rows:
        if asked:
            what = "these files were scored on general text, which holds no prompt to answer"
            raise RecipeError(what, "eval.eos_rows", "eval.eos_rows=0")
        _, scored = parted_general_text(run.recipe.export, run.tokenizer, run.seed)
        return EvalRows(scored[: config.kl_rows], [])
    data = run.held_out()
    return EvalRows(data.scored(config.kl_rows), [] if asked == 0 else data.held_out_conversations(asked))


def rows_of_general_text(config: ExportConfig, tokenizer: "PreTrainedTokenizerFast", seed: int) -> ExportRows:
    """General text to calibrate on, and other general text to score on."""
    usable, scored = parted_general_text(config, tokenizer, seed)
    # Spread over the text, so that few rows still see many kinds.
    places = np.linspace(0, len(usable) - 1, min(config.calibration_rows, len(usable))).round().astype(int)
    calibration = [usable[place] for place in places.tolist()]
    log.info(
        f"no data is given: calibrating on {counted(len(calibration), 'row')} of built-in general text, "
        f"and scoring on {counted(len(scored), 'other')}, {GENERAL_TOKENS} tokens each; data=<option> "
        "data.train_file=<rows like those that "
        "it will see> serves a model with a task better"
    )
    origin = {"calibration": GENERAL_TEXT, "rows": len(calibration), "scored": len(scored), "tokens": GENERAL_TOKENS}
    return ExportRows(calibration, scored, origin)


def parted_general_text(
    config: ExportConfig, tokenizer: "PreTrainedTokenizerFast", seed: int
) -> tuple[list[list[int]], list[TokenRow]]:
    """Token ids of rows that may calibrate, and rows to score on.

    The last rows are scored on, at most a third of the text; the row before them is in neither part, since a passage
    may go on from one row to the next.
    """
    rows = general_rows(tokenizer, _ALL, GENERAL_TOKENS, seed)
    scored = rows[len(rows) - min(config.score_rows, int(len(rows) * MOST_SCORED)) :]
    usable = rows[: len(rows) - len(scored) - 1]
    return usable, [_row(ids, number) for number, ids in enumerate(scored, 1)]


def _row(ids: list[int], number: int) -> TokenRow:
    return TokenRow(tuple(ids), (True,) * len(ids), GENERAL_TEXT, number)
