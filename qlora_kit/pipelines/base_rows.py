"""Rows for a base that was never trained: of a data recipe, else of the general text that the kit ships."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.core.console.lines import log
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted
from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.data.tokens import TokenRow
from qlora_kit.export.calibration import calibration_rows
from qlora_kit.export.general_text import general_rows
from qlora_kit.pipelines.exportable import ExportRows
from qlora_kit.pipelines.rows import context_of
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.export import ExportConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERAL_TEXT = "general text of the kit"
HELD_OUT_SHARE = 0.2  # of a recipe's rows, where it holds none out itself
GENERAL_TOKENS = 128  # of a row: the text is short, and few long rows would see few kinds of it
MOST_SCORED = 1 / 3  # share of the general text that is scored on
_ALL = 1_000_000


def rows_of_data(
    data: DataConfig, config: ExportConfig, base_folder: Path, tokenizer: "PreTrainedTokenizerFast"
) -> ExportRows:
    """Rows of a data recipe: training rows and some general text to calibrate on, held-out rows to score on.

    Raises:
        RecipeError: the rows cannot be used.
    """
    prepared = prepared_rows(data, base_folder, tokenizer)
    calibration = calibration_rows(
        prepared.train,
        config.calibration_rows,
        held_out=prepared.held_out,
        tokenizer=tokenizer,
        general_share=config.calibration_general,
        seed=data.seed,
    )
    scored = prepared.scored(config.score_rows)
    log.info(
        f"calibrating on {counted(len(calibration), 'row')} of data, with export.calibration_general of them general "
        "text"
    )
    return ExportRows(calibration, scored, {"calibration": "rows of data", **asdict(prepared.summary)})


def prepared_rows(data: DataConfig, base_folder: Path, tokenizer: "PreTrainedTokenizerFast") -> PreparedData:
    """Rows of a data recipe, of which some are held out.

    A recipe that holds nothing out has a share of its rows held out here. `data.max_tokens=auto` is the base's context.

    Raises:
        RecipeError: the rows cannot be used.
    """
    if not data.holds_out:
        log.info(f"data holds no rows out: {HELD_OUT_SHARE:.0%} of them are set aside to score on")
        data = replace(data, eval_share=HELD_OUT_SHARE)
    context = context_of(read_json(base_folder / "config.json"))
    return prepare(data, tokenizer, lambda longest: min(longest, context))


def rows_of_general_text(config: ExportConfig, tokenizer: "PreTrainedTokenizerFast", seed: int) -> ExportRows:
    """General text to calibrate on, and other general text to score on."""
    usable, scored = parted_general_text(config, tokenizer, seed)
    # Spread over the text, so that few rows still see many kinds.
    places = np.linspace(0, len(usable) - 1, min(config.calibration_rows, len(usable))).round().astype(int)
    calibration = [usable[place] for place in places.tolist()]
    log.info(
        f"no data is given: calibrating on {counted(len(calibration), 'row')} of the general text that the kit ships, "
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
