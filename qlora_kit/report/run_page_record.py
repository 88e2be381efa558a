"""How a run was made: setup, rows, and what it takes to make it again."""

from collections import Counter
from collections.abc import Sequence

from qlora_kit.core.shell import shell_line
from qlora_kit.core.units import counted, human_count
from qlora_kit.report.page import table, text
from qlora_kit.report.run_page_facts import Environment, RunPage, Split
from qlora_kit.schema.quant import QuantKind
from qlora_kit.schema.root import TrainRecipe

LONG_ROWS = {
    "longer": "longer than the limit",
    "dropped": "dropped for it",
    "cut": "cut",
    "pieces": "pieces made by splitting",
    "untrained": "dropped without a trained token",
}


def setup(page: RunPage) -> str:
    """Model, adapter, optimizer and machine as a list of facts."""
    facts = _of_recipe(page.recipe, page.result.get("trainable_parameters"), page.optimizer) if page.recipe else []
    facts += [("Reaches", "; ".join(page.reach))] if page.reach else []
    hardware = hardware_of(page.environment)
    facts += [("Hardware", hardware)] if hardware else []
    facts += [("Started", page.started)] if page.started else []
    return facts_list(facts)


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values as a list; empty without any."""
    lines = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)
    return f'<dl class="facts">{lines}</dl>' if lines else ""


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


def data_facts(splits: Sequence[Split]) -> str:
    """Counts, shares and lengths by split and source, and what became of long rows."""
    if not splits:
        return ""
    columns = ("split", "source", "rows", "tokens", "trained tokens", "trained share", "mean row", "longest", "skipped")
    rows = [line for split in splits for line in _lines(split)]
    parts = [table(columns, rows, numbers=range(2, 9))]
    limits = {split.max_tokens for split in splits if split.max_tokens}
    if limits:
        parts.append(f'<p class="note">Lengths in tokens; the limit was {max(limits):,}.</p>')
    for split in splits:
        said = [f"{count:,} {LONG_ROWS.get(key, key)}" for key, count in split.long_rows.items() if count]
        if said:
            parts.append(f'<p class="note">Rows, {text(split.name)}: {text(", ".join(said))}.</p>')
    return "\n".join(parts)


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


def reproduction(page: RunPage) -> str:
    """The command line, hashes of the rows, versions, and the whole recipe."""
    parts = []
    if page.overrides:
        line = shell_line(["qlora-kit", "train" if page.untrained is None else "export", *page.overrides])
        parts.append(f"<p>The command, run where the same files lie:</p><pre>{text(line)}</pre>")
    hashes = {path: digest for split in page.splits for one in split.sources for path, digest in one.sha256.items()}
    if hashes:
        parts.append(f"<h3>Files of rows</h3>{table(('file', 'SHA-256'), list(hashes.items()))}")
    environment = page.environment
    versions = [(name, version) for name, version in (("Python", environment.python), *environment.packages.items())]
    if any(version for _, version in versions):
        said = "".join(f"<div><dt>{text(name)}</dt><dd>{text(version)}</dd></div>" for name, version in versions)
        parts.append(f'<h3>Versions</h3><dl class="versions">{said}</dl>')
    if environment.platform:
        parts.append(f'<p class="note">{text(environment.platform)}</p>')
    if page.recipe_yaml:
        file = "recipe.yaml" if page.untrained is None else "export.yaml"
        recipe = f"<pre>{text(page.recipe_yaml.rstrip())}</pre>"
        parts.append(f"<details><summary>The whole recipe, {file}</summary>{recipe}</details>")
    return "\n".join(parts)
