"""Which group sizes a model's linear layers allow, from its config.json alone."""

from collections.abc import Callable, Iterable, Mapping

from qlora_kit.core.errors import Problem

WHOLE_ROW = -1
_SMALLEST = 16
_SMALL_SHARE = 0.05


def dividing_group_sizes(widths: Iterable[int]) -> list[int]:
    """Powers of two from 16 up that divide every input width, then -1 (one group a row)."""
    all_widths = set(widths)
    sizes = []
    size = _SMALLEST
    while all_widths and size <= min(all_widths):
        if all(width % size == 0 for width in all_widths):
            sizes.append(size)
        size *= 2
    return [*sizes, WHOLE_ROW]


def check_group_size(group_size: int, widths_by_module: Mapping[str, int]) -> Problem | None:
    """What is wrong with a group size for these layers (name to in_features), or None.

    A size that does not divide an input width leaves a short last group, which quantizers write without a word and
    kernels then refuse.
    """
    fix = f"group_size: {' | '.join(map(str, dividing_group_sizes(widths_by_module.values())))}"
    if group_size == WHOLE_ROW:
        return None
    if group_size <= 0:
        return Problem(f"group_size={group_size} is neither a positive number nor -1", where="group_size", fix=fix)
    for module, width in widths_by_module.items():
        if width % group_size:
            what = f"group_size={group_size} does not divide in_features={width} of '{module}'"
            return Problem(what, where="group_size", fix=fix)
    return None


def divides(group_size: int, inputs: int) -> bool:
    """Whether groups of a size, or one of the whole row, divide a row of so many inputs."""
    return group_size == WHOLE_ROW or (group_size > 0 and inputs % group_size == 0)


def inputs_of_group(group_size: int, inputs: int) -> int:
    """How many inputs of a row share a scale."""
    return inputs if group_size == WHOLE_ROW else group_size


def unfit_layers(shapes: Mapping[str, tuple[int, int]], fits: Callable[[int, int], bool]) -> tuple[str, ...]:
    """Layers that a layout does not hold, where they are few enough that a file goes without them.

    Small projections beside the large ones, as hybrids have them, are; where it is more, the settings are at fault.

    Args:
        shapes: (out_features, in_features) by name.
        fits: whether a layer of so many outputs and inputs is held.
    """
    unfit = tuple(name for name, shape in shapes.items() if not fits(*shape))
    whole = sum(outputs * inputs for outputs, inputs in shapes.values())
    return unfit if sum(shapes[name][0] * shapes[name][1] for name in unfit) <= _SMALL_SHARE * whole else ()


def linear_input_widths(config: Mapping[str, object]) -> dict[str, int]:
    """Input width of each kind of linear layer in a decoder, by its usual name.

    Reads `hidden_size`, `intermediate_size`, `num_attention_heads`, `head_dim` or `v_head_dim` and, for mixtures of
    experts, `moe_intermediate_size`, from a config.json or from its `text_config`.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    hidden, heads = _number(text, "hidden_size"), _number(text, "num_attention_heads")
    attention = (
        heads * (_number(text, "v_head_dim") or _number(text, "head_dim") or hidden // heads) if heads else hidden
    )
    layer = "model.layers.*"
    widths = {f"{layer}.self_attn.{name}_proj": hidden for name in ("q", "k", "v")}
    widths[f"{layer}.self_attn.o_proj"] = attention
    widths |= {f"{layer}.mlp.{name}_proj": hidden for name in ("gate", "up")}
    widths[f"{layer}.mlp.down_proj"] = _number(text, "intermediate_size")
    if experts := _number(text, "moe_intermediate_size"):
        widths[f"{layer}.mlp.experts.*.down_proj"] = experts
    return {name: width for name, width in widths.items() if width}


def _number(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0
