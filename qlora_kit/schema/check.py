"""What a recipe may not say: bounds of each field, and combinations across groups."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

from qlora_kit.core.device import has_nvidia_gpu
from qlora_kit.core.extras import EXTRA_OF_MODULE, install_line, is_present
from qlora_kit.families.registry import CHAT_TEMPLATES
from qlora_kit.schema import walk
from qlora_kit.schema.amount import parse_amount
from qlora_kit.schema.bounds import out_of_bounds
from qlora_kit.schema.budget import check_budgets
from qlora_kit.schema.check_data import check_data
from qlora_kit.schema.check_wished import wrong_exports
from qlora_kit.schema.engine import Compute, EngineMode
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.field import Sealed, Setting
from qlora_kit.schema.issue import Issue as Issue
from qlora_kit.schema.lora import TARGET_SETS, LoraInit
from qlora_kit.schema.model import Attention
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.quant import ComputeDtype, QuantKind
from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe

MOST_NAME_PARTS = 3
EVAL_NAMES = {"base": "untrained model", "adapter": "trained model"}
UNMERGEABLE_INITS = {
    LoraInit.pissa: "moves part of the base's weights into the adapter, which a 4-bit base cannot give up",
    LoraInit.corda: "moves part of the base's weights into the adapter, which a 4-bit base cannot give up",
    LoraInit.orthogonal: "needs floating-point base weights",
}


def check(recipe: Sealed) -> list[Issue]:
    """Everything that is wrong with a composed recipe, heavy imports aside."""
    found = list(_bounds(recipe))
    rules: list[Callable[[], Iterator[Issue]]] = []
    if isinstance(recipe, TrainRecipe):
        parts = (_name, _model, _lora, check_data, _optim, _engine, _device, _tracking, wrong_exports)
        rules = [lambda rule=rule: rule(recipe) for rule in parts]  # type: ignore[misc]  # mypy cannot infer the default argument
    elif isinstance(recipe, ExportRecipe):
        rules = [lambda: _export(recipe.export)]
    elif isinstance(recipe, EvalRecipe):
        rules = [lambda: _eval(recipe.eval)]
    for rule in rules:
        found.extend(rule())
    return found


def check_settings(recipe: TrainRecipe) -> list[Issue]:
    """What is wrong on every machine and with all rows: a plan made elsewhere would be for nothing."""
    return [*_bounds(recipe), *_lora(recipe), *_optim(recipe), *_engine(recipe)]


def _bounds(recipe: Sealed) -> Iterator[Issue]:
    for path, value, setting in walk.values(recipe):
        if isinstance(value, list | dict):
            inside = value.values() if isinstance(value, dict) else value
            wrong = (out_of_bounds(path, part, Setting("")) for part in inside if _is_number(part))
            yield from (Issue(path, found.what) for found in wrong if found)
        elif _is_number(value) and (found := out_of_bounds(path, value, setting)):
            default = walk.example(type(recipe), path, object()) if walk.is_leaf(type(recipe), path) else ""
            yield Issue(path, found.what, f"{path}={found.fitting}" if found.fitting else default)


def _name(recipe: TrainRecipe) -> Iterator[Issue]:
    parts = recipe.name.split("/")
    wrong = next((part for part in parts if not is_plain_name(part)), None)
    if wrong is not None or len(parts) > MOST_NAME_PARTS:
        rule = f"at most {MOST_NAME_PARTS} names with / between them, none empty, hidden, over 100 bytes or unprintable"
        yield Issue("name", f"name={recipe.name[:80]!r} is no folder below outputs/: it is {rule}", "name=run")


def is_plain_name(name: str) -> bool:
    """Whether a name is that of one folder that stays where it is put and is found again."""
    is_shown = name.isprintable() and name == name.strip() and not name.startswith(".")
    return bool(name) and is_shown and len(name.encode("utf-8", "replace")) <= 100 and not set(name) & set("/\\")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _model(recipe: TrainRecipe) -> Iterator[Issue]:
    template = recipe.model.chat_template
    if template is not None and template not in CHAT_TEMPLATES and not Path(template).is_file():
        yield Issue("model.chat_template", f"no such chat template file: {template}", "model.chat_template=null")
    if recipe.model.attention is Attention.flash_attention_2 and not is_present("flash_attn"):
        yield Issue(
            "model.attention",
            "flash_attention_2 needs the package 'flash_attn', which is not installed",
            "model.attention=sdpa",
        )


def _lora(recipe: TrainRecipe) -> Iterator[Issue]:
    lora, quantized = recipe.lora, recipe.quant.kind is not QuantKind.none
    kind = recipe.quant.kind.name
    if quantized and lora.init in UNMERGEABLE_INITS:
        dora = " (with or without DoRA)" if lora.use_dora else ""
        yield Issue(
            "lora.init",
            f"lora.init={lora.init.name}{dora} cannot be trained and merged on a {kind} base: "
            f"it {UNMERGEABLE_INITS[lora.init]}",
            "lora.init=default",
        )
    if lora.lora_bias:
        yield Issue(
            "lora.lora_bias",
            "lora.lora_bias=true cannot be merged: the linear layers of these models have no bias to add it to",
            "lora.lora_bias=false",
        )
    if lora.use_dora and recipe.quant.kind is QuantKind.int8:
        yield Issue(
            "lora.use_dora",
            "DoRA cannot be merged faithfully on an int8 base: its column norms are taken from weights that "
            "LLM.int8 rounds per row and mixes with 16-bit outliers",
            "quant=nf4_double",
        )
    if not lora.targets:
        yield Issue("lora.targets", "lora.targets is empty, so nothing would be trained", "lora.targets=[all_linear]")
    for name in lora.targets:
        if name in ("lm_head", "embed_tokens"):
            yield Issue(
                "lora.targets",
                f"lora.targets names {name}; the loss reads that weight directly, so an adapter on it would be ignored",
                f"lora.targets=[all_linear] lora.modules_to_save=[{name}]",
            )
    for field in ("rank_pattern", "alpha_pattern"):
        for name, value in getattr(lora, field).items():
            if value <= 0:
                yield Issue(f"lora.{field}", f"lora.{field} gives {name} the value {value}; it must be above 0")


def _optim(recipe: TrainRecipe) -> Iterator[Issue]:
    optim = recipe.optim
    if optim.loraplus_ratio != OptimConfig.loraplus_ratio and optim.name.value.groups != "loraplus":
        what = f"optim.loraplus_ratio has no effect: with optim.name={optim.name.name} all of LoRA learns at one rate"
        yield Issue("optim.loraplus_ratio", what, "optim.name=loraplus")


def _engine(recipe: TrainRecipe) -> Iterator[Issue]:
    engine = recipe.engine
    for name, value in (("recompute", engine.recompute), ("cached_weights", engine.cached_weights)):
        try:
            parse_amount(value)
        except ValueError as error:
            yield Issue(f"engine.{name}", f"engine.{name}: {error}", f"engine.{name}=auto")
    if engine.mode is EngineMode.plain and engine.compute is not Compute.bf16:
        what = f"engine.compute={engine.compute.name} needs the fast engine; the plain one is peft's own arithmetic"
        yield Issue("engine.compute", what, "engine.mode=fast")
    kind = recipe.quant.kind
    if engine.compute is not Compute.bf16 and not kind.is_4bit:
        what = f"engine.compute={engine.compute.name} is made from 4-bit weights, and quant.kind is {kind.name}"
        yield Issue("engine.compute", what, "quant=nf4_double")


def _device(recipe: TrainRecipe) -> Iterator[Issue]:
    if has_nvidia_gpu():
        return
    if (compute := recipe.engine.compute) is not Compute.bf16:
        what = f"engine.compute={compute.name} needs a GPU with fp8 (Ada, Hopper or newer), and there is none"
        yield Issue("engine.compute", what, "engine.compute=bf16")
    if not recipe.optim.fallback and recipe.optim.name.needs_gpu:
        yield Issue(
            "optim.fallback",
            f"optim.name={recipe.optim.name.name} needs a GPU, there is none, "
            "and optim.fallback=false forbids plain AdamW",
            "optim.fallback=true",
        )
    if recipe.quant.compute_dtype is ComputeDtype.float16:
        yield Issue(
            "quant.compute_dtype", "float16 training needs a GPU, and there is none", "quant.compute_dtype=bfloat16"
        )
    if recipe.model.attention is Attention.flex_attention:
        what = "flex_attention cannot train without a GPU: torch has no backward of it on a CPU"
        yield Issue("model.attention", what, "model.attention=sdpa")
    if recipe.model.attention is Attention.flash_attention_2:
        yield Issue("model.attention", "flash_attention_2 needs a GPU, and there is none", "model.attention=sdpa")


def _tracking(recipe: TrainRecipe) -> Iterator[Issue]:
    for name in recipe.tracker.services:
        if not is_present(name):
            what = f"tracker={name} needs the package '{name}', which is not installed"
            yield Issue(f"tracker.{name}", what, install_line(EXTRA_OF_MODULE[name]))


def _export(export: ExportConfig) -> Iterator[Issue]:
    targets = list(export.targets())
    names = [one.name for one in targets]
    for name in names:
        if not is_plain_name(name):
            yield Issue("export", f"an export is a folder, and {name[:80]!r} is no plain name of one")
    if not names:
        yield Issue("export", "no export is named", "export=[gguf_q4_k_m]")
    for name in sorted(EVAL_NAMES.keys() & set(names)):
        yield Issue("export", f"an export cannot be named {name}: that is what eval calls the {EVAL_NAMES[name]}")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Issue("export", f"two exports are named {name}; each gets a folder of its own")
    for one in targets:
        yield from one.target.issues(one.path)
    yield from check_budgets(export)
    for module, extra in {module: extra for one in targets for module, extra in one.target.needs.items()}.items():
        if not is_present(module):
            fix = install_line(extra)
            yield Issue("export", f"this export needs the package '{module}', which is not installed", fix)


def _eval(config: EvalConfig) -> Iterator[Issue]:
    if not config.artifacts:
        yield Issue("eval.artifacts", "eval.artifacts is empty, so nothing would be scored", "eval.artifacts=[all]")


def known_targets(linear_names: set[str]) -> set[str]:
    """Names that `lora.targets` may hold for a model with these linear modules (last parts of their names)."""
    return linear_names | set(TARGET_SETS)


def check_targets(targets: list[str], linear_names: set[str]) -> list[Issue]:
    """Targets that name no linear module of the base."""
    known = sorted(known_targets(linear_names))
    return [
        Issue(
            "lora.targets",
            f"lora.targets names {name}, which is no linear module of this base; it has {', '.join(known)}",
            "lora.targets=[all_linear]",
        )
        for name in targets
        if name not in known and name not in ("lm_head", "embed_tokens")
    ]
