"""A recipe's rows, prepared for this device: `data.max_tokens=auto` resolved, bins packed."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.console.lines import log
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted, human_bytes
from qlora_kit.data.audit.audit import Audit, audit
from qlora_kit.data.audit.embedding import beyond_embedding
from qlora_kit.data.audit.finding import by_level
from qlora_kit.data.audit.unmeasured import nothing_held_out
from qlora_kit.data.encode import Encoder
from qlora_kit.data.packing import Packing, pack
from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.data.template.prompt_check import prompt_finding
from qlora_kit.memory.free import free_memory_bytes
from qlora_kit.memory.longest import longest_that_fits, no_row_fits
from qlora_kit.model.sizes import context_of, embedding_rows
from qlora_kit.model.tokenizer import stop_ids
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.forecast import KnownBase, needed_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def rows_that_fit(
    recipe: TrainRecipe, base_folder: Path, tokenizer: "PreTrainedTokenizerFast", free_bytes: float | None = None
) -> PreparedData:
    """Both splits of a recipe, no row longer than `data.max_tokens` or what `auto` comes to.

    Args:
        free_bytes: of a device that is not at hand; None for this one's.
    Raises:
        RecipeError: the rows cannot be used, or not even a short one fits.
    """
    return prepare(recipe.data, tokenizer, lambda longest: longest_row(recipe, base_folder, longest, free_bytes))


def packing_of(config: DataConfig, data: PreparedData) -> Packing | None:
    """The bins that the training rows are packed into; None where they are padded."""
    if config.batching is not Batching.packed:
        return None
    return pack(data.train.lengths, data.summary.train.max_tokens)


def audit_of(
    recipe: TrainRecipe,
    data: PreparedData,
    packing: Packing | None,
    base_folder: Path,
    tokenizer: "PreTrainedTokenizerFast",
) -> Audit:
    """What is to be said of the rows before a weight is loaded."""
    found = audit(
        data,
        tokenizer,
        data.summary.train.max_tokens,
        stop_ids(base_folder, tokenizer),
        train_on=recipe.data.train_on,
        packing=packing,
        batch_size=recipe.trainer.batch_size,
    )
    extra = (
        prompt_finding(Encoder.of(tokenizer).template if recipe.data.apply_chat_template else None),
        nothing_held_out(recipe.data, data.train),
    )
    findings = [*found.findings, *filter(None, extra)]
    size = embedding_rows(read_json(base_folder / "config.json"))
    if size is not None:
        findings += beyond_embedding({"training": data.train, "held-out": data.held_out}, tokenizer, size)
    return replace(found, findings=by_level(findings))


def longest_row(recipe: TrainRecipe, base_folder: Path, longest: int, free_bytes: float | None = None) -> int:
    """Tokens that a row may have.

    `auto` is the smallest of what fits into the device's free memory, the model's context, and, where rows are not
    packed, the longest row there is.

    Args:
        longest: tokens of the longest row.
        free_bytes: of a device that is not at hand; None for this one's.

    Raises:
        RecipeError: not even a short row fits.
    """
    if isinstance(recipe.data.max_tokens, int):
        return recipe.data.max_tokens
    config = read_json(base_folder / "config.json")
    context = context_of(config)
    is_packed = recipe.data.batching is Batching.packed
    most = context if is_packed else min(context, longest)
    free = free_memory_bytes() if free_bytes is None else free_bytes
    fits = longest_that_fits(needed_bytes(recipe, KnownBase.in_folder(base_folder)), free, most)
    if fits == 0:
        raise no_row_fits(free, "trainer.batch_size=1, or see qlora-kit plan for what needs the memory")
    why = "the model's context" if fits == context else "the longest row" if fits == most else "what fits"
    row = f"the longest row has {counted(longest, 'token')}"
    log.info(f"data.max_tokens=auto: {fits}, {why} ({human_bytes(free)} free, {row})")
    return fits
