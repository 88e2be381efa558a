"""Why a base cannot be trained as a recipe says, by what it is made of; found without its weights."""

from collections.abc import Collection, Iterator, Mapping

from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_kit.core.errors import Problem
from qlora_kit.core.patterns import matched, whole_or_end
from qlora_kit.core.shell import hydra_value, shell_line
from qlora_kit.core.units import counted, human_bytes, human_count
from qlora_kit.model.stacked_experts import experts_of, stacked_names
from qlora_kit.model.structure import Weights, transposed_modules
from qlora_kit.model.unlike_config import UnlikeConfig
from qlora_kit.schema.lora import LoraConfig, LoraInit
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.weights.headers import StoredTensor

WITHOUT_EXPERTS = "lora.experts=false"
ATTENTION_ONLY = "lora.targets=[attention]"
_NAMED = 5  # names in a line


def base_problems(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    weights: list[Weights],
    tensors: Mapping[str, StoredTensor] | None,
    stacks: Collection[str],
    unlike: UnlikeConfig,
) -> list[Problem]:
    """What speaks against this base with this recipe, whatever modules the adapter is to reach.

    Args:
        model: the base without its weights.
        tensors: of the checkpoint, by the model's names; None where only its config.json is at hand.
        stacks: of experts that are known to be made of those.
        unlike: where those are not the tensors of the model.
    """
    if torn := list(_torn(unlike)):
        return torn
    return [
        *_transposed(recipe, model),
        *_experts(recipe, weights),
        *([] if tensors is None else _unknown_layout(recipe, model, stacks)),
        *_kept_nowhere(recipe, model),
        *_made_of_others(weights, tensors),
        *_shared(model, weights),
    ]


def unmatched_patterns(recipe: TrainRecipe, promised: set[str]) -> Iterator[Problem]:
    """Patterns of ranks and alphas that fit no adapted module.

    Args:
        promised: full names of the modules that the targets mean.
    """
    for key, patterns in (("rank_pattern", recipe.lora.rank_pattern), ("alpha_pattern", recipe.lora.alpha_pattern)):
        expressions = {pattern: whole_or_end(pattern) for pattern in patterns}
        found = matched(expressions.values(), sorted(promised))
        for pattern, expression in expressions.items():
            names = found[expression]
            if isinstance(names, str):
                yield Problem(f"lora.{key} names {pattern}, {names}", f"lora.{key}")
            elif not names:
                yield Problem(f"lora.{key} names {pattern}, and no adapted module is named so", f"lora.{key}")


def saved_twice(
    recipe: TrainRecipe, promised: set[str], rounded: set[str], experts: Collection[str]
) -> Iterator[Problem]:
    """Modules that cannot be trained in full: they are stored in few bits, carry LoRA too, or are a layer's experts.

    Args:
        promised: full names of the modules that the targets mean.
        rounded: of those that are quantized.
        experts: of those that hold the experts of a layer.
    """
    for saved in recipe.lora.modules_to_save:
        if any(name.endswith(saved) for name in experts):
            others = [name for name in recipe.lora.modules_to_save if name != saved]
            what = (
                "which holds the experts of a mixture: LoRA adapts them (lora.experts), and nothing trains them in full"
            )
            fix = shell_line([f"lora.modules_to_save={hydra_value(others)}"])
            yield Problem(f"lora.modules_to_save names {saved}, {what}", "lora.modules_to_save", fix)
            continue
        if any(name.endswith(saved) for name in rounded):
            what = f"which is stored as {recipe.quant.kind.name} and can only be trained in full in 16 bit"
            kept = sorted({saved, *recipe.quant.keep_16bit})
            yield Problem(
                f"lora.modules_to_save names {saved}, {what}",
                "lora.modules_to_save",
                shell_line([f"quant.keep_16bit={hydra_value(kept)}"]),
            )
        if any(name.endswith(saved) for name in promised):
            what = "which lora.targets adapts too: leave it out of one of them"
            yield Problem(f"lora.modules_to_save names {saved}, {what}", "lora.modules_to_save")


def few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _transposed(recipe: TrainRecipe, model: PreTrainedModel) -> Iterator[Problem]:
    """Settings that reckon with the rows of a linear map, of a base that holds its maps the other way around."""
    names, lora = transposed_modules(model), recipe.lora
    if not names:
        return
    for key, is_odd in {"use_dora": lora.use_dora, "init": lora.init in (LoraInit.pissa, LoraInit.olora)}.items():
        if is_odd:
            what = f"this base holds its linear maps the other way around ({few(names)}), which lora.{key} cannot be"
            yield Problem(f"{what} merged into: leave it at its default", f"lora.{key}")


def _experts(recipe: TrainRecipe, weights: list[Weights]) -> Iterator[Problem]:
    experts = [part for part in weights if part.kind == "experts"]
    if not experts:
        return
    yield from _expert_lora(recipe.lora)
    quant, names = recipe.quant, sorted({part.last for part in experts})
    if quant.kind is not QuantKind.int8 or _all_kept(experts, quant):
        return
    count, total = sum(part.count for part in experts), sum(part.count for part in weights)
    what = (
        f"{recipe.model.source} keeps its experts in one tensor a layer ({human_count(count)} of "
        f"{human_count(total)} weights, {count / total:.0%}), which int8 does not quantize: they would take "
        f"{human_bytes(2 * count)}; store the base in 4 bit, or say that they stay "
        f"(quant.keep_16bit=[{','.join(sorted({*names, *quant.keep_16bit}))}])"
    )
    yield Problem(what, "quant.kind", "quant=nf4_double")


def _unknown_layout(recipe: TrainRecipe, model: PreTrainedModel, known: Collection[str]) -> Iterator[Problem]:
    """Stacks of experts that are made of the checkpoint's tensors in a way that no merge could go back."""
    if not recipe.lora.adapts_experts:
        return
    stacks = [f"{name}.{stack}" for name, module in experts_of(model).items() for stack in stacked_names(module)]
    if unknown := [name for name in stacks if name not in known]:
        what = (
            f"the checkpoint holds the experts of {few(unknown)} in a form that an adapter could not be merged into; "
            "train the rest alone"
        )
        yield Problem(what, "lora.experts", WITHOUT_EXPERTS)


def _expert_lora(lora: LoraConfig) -> Iterator[Problem]:
    """Settings that peft's form of an adapter on experts has no place for."""
    if not lora.adapts_experts:
        return
    odd = {
        "use_dora": lora.use_dora,
        "lora_bias": lora.lora_bias,
        "dropout": lora.dropout > 0,
        "init": lora.init is not LoraInit.default,
    }
    for key in [key for key, is_odd in odd.items() if is_odd]:
        what = f"an adapter of experts has no lora.{key}: leave it at its default, or train the rest alone"
        yield Problem(what, f"lora.{key}", WITHOUT_EXPERTS)


def _all_kept(experts: list[Weights], quant: QuantConfig) -> bool:
    return not any(should_convert_module(part.name, list(quant.keep_16bit)) for part in experts)


def _kept_nowhere(recipe: TrainRecipe, model: PreTrainedModel) -> Iterator[Problem]:
    """Names in the recipe that mean no module of this base."""
    names = [name for name, _ in model.named_modules() if name]
    for kept in recipe.quant.keep_16bit:
        if all(should_convert_module(name, [kept]) for name in names):
            yield Problem(f"quant.keep_16bit names {kept}, and this base has no such module", "quant.keep_16bit")
    for saved in recipe.lora.modules_to_save:
        if not any(name == saved or name.endswith(f".{saved}") for name in names):
            yield Problem(
                f"lora.modules_to_save names {saved}, and this base has no such module", "lora.modules_to_save"
            )


def _shared(model: PreTrainedModel, weights: list[Weights]) -> Iterator[Problem]:
    """Layers that share their weights, as the transformer blocks of Zamba 2 do.

    Each use would get an adapter of its own, while the checkpoint holds one weight for all.
    """
    linears = {f"{part.name}.weight" for part in weights if part.kind == "linear"}
    by_weight: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(weight), []).append(name)
    of_linears = (names for names in by_weight.values() if names[0] in linears)
    if again := [name.removesuffix(".weight") for names in of_linears for name in names[1:]]:
        what = (
            f"layers of this base share their weights: {counted(len(again), 'linear module is', 'linear modules are')} "
            f"another layer's too, such as {again[0]}. Each would learn an adapter of its own, and no file has a place "
            "for more than one weight"
        )
        yield Problem(what, "model.source", "model.source=<a base whose layers have weights of their own>")


def _torn(unlike: UnlikeConfig) -> Iterator[Problem]:
    """A checkpoint that was cut, or lies beside the config.json of another."""
    again = "copy or fetch the whole folder again"
    if unlike.missing:
        count = counted(len(unlike.missing), "weight")
        what = f"the checkpoint lacks {count} of the model that its config.json describes: {few(list(unlike.missing))}"
        yield Problem(f"{what}; {again}", "model.source")
    if unlike.odd:
        what = f"the checkpoint is not the one that its config.json describes: {few(list(unlike.odd.values()))}"
        yield Problem(f"{what}; {again}", "model.source")


def _made_of_others(weights: list[Weights], tensors: Mapping[str, StoredTensor] | None) -> Iterator[Problem]:
    """Linear modules that the checkpoint holds in parts, or in a changed form."""
    if tensors is None:
        return
    if absent := [part.name for part in weights if part.kind == "linear" and f"{part.name}.weight" not in tensors]:
        what = f"the checkpoint holds no weight of {len(absent)} linear modules of its model: {few(absent)}"
        yield Problem(f"{what}; an adapter of it could not be exported", "model.source")
