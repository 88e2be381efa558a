"""How a run or the exports of a base were made: setup, rows, and what it takes to make them again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.core.shell import shell_line
from qlora_kit.core.units import counted, human_count
from qlora_kit.report.page import Table
from qlora_kit.report.run_page_facts import Environment, RunPage, Split, Untrained
from qlora_kit.schema.quant import QuantKind
from qlora_kit.schema.root import TrainRecipe

LONG_ROWS = {
    "longer": "longer than the limit",
    "dropped": "dropped for it",
    "cut": "cut",
    "pieces": "pieces made by splitting",
    "untrained": "dropped without a trained token",
}


@dataclass(frozen=True)
class Rows:
    """Rows of every split.

    Attributes:
        limit: tokens that a row might have; None where there was no limit.
        long_rows: a split, and what became of its long rows.
    """

    table: Table
    limit: int | None
    long_rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Record:
    """What it takes to make the files again; what is not known is empty.

    Attributes:
        files: of rows, with their hashes.
        versions: Python's and those of packages, by name.
        recipe: the whole of it, as `recipe_file` holds it.
    """

    command: str
    files: Table
    versions: Sequence[tuple[str, str]]
    platform: str
    recipe: str
    recipe_file: str

    def __bool__(self) -> bool:
        return any((self.command, self.files.rows, self.versions, self.platform, self.recipe))


def setup(page: RunPage) -> list[tuple[str, str]]:
    """Model, adapter, optimizer and machine by name."""
    if page.untrained is not None:
        return _base_setup(page, page.untrained)
    facts = _of_recipe(page.recipe, page.result.get("trainable_parameters"), page.optimizer) if page.recipe else []
    facts += [("Reaches", "; ".join(page.reach))] if page.reach else []
    return facts + _machine(page)


def _base_setup(page: RunPage, untrained: Untrained) -> list[tuple[str, str]]:
    """What was exported, and on which machine."""
    at = f" at {untrained.recipe.revision}" if untrained.recipe and untrained.recipe.revision else ""
    return ([("Base", f"{untrained.base}{at}")] if untrained.base else []) + _machine(page)


def _machine(page: RunPage) -> list[tuple[str, str]]:
    facts = [("Hardware", hardware_of(page.environment)), ("Started", page.started)]
    return [(name, value) for name, value in facts if value]


def hardware_of(environment: Environment) -> str:
    """Devices in words: 2 x NVIDIA H100 80GB HBM3, CUDA 13.0; or 2 CPU cores."""
    devices = [f"{count} x {name}" for name, count in Counter(environment.gpus).items()]
    if devices:
        return ", ".join([*devices, *([f"CUDA {environment.cuda}"] if environment.cuda else [])])
    return counted(environment.cpu_count, "CPU core") if environment.cpu_count else ""


def _of_recipe(recipe: TrainRecipe, parameters: float | None, ran: str) -> list[tuple[str, str]]:
    model, quant, lora, optim, trainer = recipe.model, recipe.quant, recipe.lora, recipe.optim, recipe.trainer
    revision = f" at {model.revision}" if model.revision else ""
    stored = "16 bit" if quant.kind is QuantKind.none else quant.kind.name
    double = ", double quantization" if quant.kind.is_4bit and quant.double_quant else ""
    size = f", {human_count(parameters)} trained weights" if parameters else ""
    kinds = [word for word, is_on in (("DoRA", lora.use_dora), ("rsLoRA", lora.use_rslora)) if is_on] or ["LoRA"]
    rows = trainer.batch_size * trainer.gradient_accumulation
    optimizer = (
        f"{ran} in place of the recipe's {optim.name.name}" if ran not in ("", optim.name.name) else optim.name.name
    )
    return [
        ("Base", f"{model.source}{revision}"),
        ("Stored as", f"{stored}{double}, computed in {quant.compute_dtype.name}"),
        ("Adapter", f"{', '.join(kinds)}: r {lora.r}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}{size}"),
        ("Optimizer", f"{optimizer}, peak learning rate {optim.learning_rate:g}, {optim.schedule.name}"),
        ("Step", f"{counted(rows, 'row')} a device, {recipe.data.batching.name} batches"),
        ("Engine", f"{recipe.engine.mode.name}, seed {trainer.seed}"),
    ]


def data_facts(splits: Sequence[Split]) -> Rows | None:
    """Counts, shares and lengths by split and source, and what became of long rows; None without any split."""
    if not splits:
        return None
    columns = ("split", "source", "rows", "tokens", "trained tokens", "trained share", "mean row", "longest", "skipped")
    table = Table(columns, [line for split in splits for line in _lines(split)], numbers=range(2, 9))
    limit = max((split.max_tokens for split in splits if split.max_tokens), default=None)
    long_rows = [
        (
            split.name,
            ", ".join(f"{count:,} {LONG_ROWS.get(key, key)}" for key, count in split.long_rows.items() if count),
        )
        for split in splits
    ]
    return Rows(table, limit, [(name, said) for name, said in long_rows if said])


def _lines(split: Split) -> list[list[str]]:
    lines = [
        [split.name, one.name, *_counts(one.rows, one.tokens, one.trained_tokens), "", _count(one.skipped)]
        for one in split.sources
    ]
    if len(lines) == 1:
        lines[0][-2] = _count(split.longest_row)
        return lines
    return [
        *lines,
        [split.name, "all", *_counts(split.rows, split.tokens, split.trained_tokens), _count(split.longest_row), ""],
    ]


def _counts(rows: int | None, tokens: int | None, trained: int | None) -> list[str]:
    share = f"{trained / tokens:.1%}" if trained is not None and tokens else ""
    mean = f"{tokens / rows:,.0f}" if tokens is not None and rows else ""
    return [_count(rows), _count(tokens), _count(trained), share, mean]


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def reproduction(page: RunPage) -> Record:
    """The command line, hashes of the rows, versions, and the whole recipe."""
    verb, file = ("train", "recipe.yaml") if page.untrained is None else ("export", "export.yaml")
    hashes = {path: digest for split in page.splits for one in split.sources for path, digest in one.sha256.items()}
    environment = page.environment
    versions = [("Python", environment.python), *environment.packages.items()]
    return Record(
        command=shell_line(["qlora-kit", verb, *page.overrides]) if page.overrides else "",
        files=Table(("file", "SHA-256"), list(hashes.items())),
        versions=versions if any(version for _, version in versions) else (),
        platform=environment.platform,
        recipe=page.recipe_yaml.rstrip(),
        recipe_file=file,
    )
