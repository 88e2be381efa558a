"""What an adapter adds to its base, read from its two files; tensors stay on disk until a weight needs them.

Names and scales are those of peft: scale alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA (Kalajdzievski 2023);
DoRA gives each row of the sum a trained length (Liu et al. 2024).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter.expert_updates import StackFactors, finite_factor
from qlora_kit.adapter.saved import CONFIG, PREFIX, WEIGHTS, split_parameters
from qlora_kit.core.errors import DamagedFileError, RunError
from qlora_kit.core.files import read_json
from qlora_kit.core.patterns import matched, whole_or_end
from qlora_kit.core.units import counted
from qlora_kit.weights.headers import StoredTensor, broken, read_header
from qlora_kit.weights.torch_rows import read_whole

if TYPE_CHECKING:
    from torch import Tensor, device


# Initial values that leave the base as it is, and those that take their product out of it.
PLAIN_INITS = (True, False, "default", "gaussian", "orthogonal", "eva")
SUBTRACTED_INITS = ("olora", "pissa")

# Fields of peft's configuration that change what is added, in ways that the kit never trains.
REFUSED = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "trainable_token_indices",
)
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")


@dataclass(frozen=True)
class Update:
    """A loaded low-rank update, float32: `left` [rows, r], scaled, `right` [r, columns], lengths [rows] for DoRA."""

    left: "Tensor"
    right: "Tensor"
    lengths: "Tensor | None"

    def add(self, weight: "Tensor", start: int = 0) -> None:
        """Add to a float32 weight, or to its rows from `start` on, in place."""
        stop = start + len(weight)
        weight.addmm_(self.left[start:stop], self.right)
        if self.lengths is not None:
            weight.mul_((self.lengths[start:stop] / weight.norm(dim=1)).unsqueeze(1))


@dataclass(frozen=True)
class LowRank:
    """The update of one module, on disk."""

    module: str
    a: StoredTensor
    b: StoredTensor
    scaling: float
    magnitude: StoredTensor | None = None
    embedding: bool = False
    init: str = ""  # of SUBTRACTED_INITS, or empty
    flipped: bool = False  # whether the weight lies [inputs, outputs]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight that it is added to."""
        is_turned = self.embedding is not self.flipped
        return (self.a.shape[1], self.b.shape[0]) if is_turned else (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        """Columns of the one factor, rows of the other."""
        return self.a.shape[0]

    def load(self, where: "device") -> Update:
        """Read the factors, in float32.

        Raises:
            RunError: a value is not finite.
        """
        a, b = (finite_factor(part).to(where) for part in (self.a, self.b))
        left, right = (a.t(), b.t().contiguous()) if self.embedding is not self.flipped else (b, a)
        lengths = None if self.magnitude is None else finite_factor(self.magnitude).to(where).view(-1)
        return Update((left * self.scaling).contiguous(), right, lengths)

    def learned(self) -> bool:
        """Whether a factor has left the zeros from which it starts."""
        first, second = (self.a, self.b) if self.embedding else (self.b, self.a)
        return bool(read_whole(first).any()) and bool(read_whole(second).any())


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: updates by module name, and the tensors that replace the base's, by tensor name.

    Attributes:
        stacks: factors of stacks of experts, by the name of the module that holds them with `.base_layer` behind it for
            each stack that follows.
    """

    folder: Path
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, StoredTensor]
    keeps_tie: bool = False
    stacks: Mapping[str, StackFactors] = field(default_factory=dict)

    @property
    def modules(self) -> int:
        """Linear modules and stacks of experts with an update."""
        return len(self.updates) + len(self.stacks)


def read_adapter(folder: Path, *, merges: bool = True) -> Adapter:
    """Read where everything lies in an adapter's folder; no tensor is loaded.

    Args:
        merges: whether it is to be merged, which needs its initial values to be known.
    Raises:
        DamagedFileError: a file is missing or broken, or the adapter's update is not a low-rank product.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DamagedFileError(f"{folder} is no adapter: it has no {name}", where=str(folder))
    config = _settings(folder / CONFIG)
    _refuse(config, folder / CONFIG, merges=merges)
    parts: dict[str, dict[str, StoredTensor]] = {}
    stacked: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    tensors = read_header(folder / WEIGHTS)
    holders = _stack_holders(config, tensors)
    for tensor in tensors:
        nested = tensor.name.removeprefix(PREFIX)
        name = nested.replace(".base_layer.", ".")
        if (match := _FACTOR.fullmatch(nested)) and _ends_in(match[1].replace(".base_layer", ""), holders):
            stacked.setdefault(match[1], {})[match[2].removeprefix("lora_")] = tensor
        elif match := _FACTOR.fullmatch(name):
            parts.setdefault(match[1], {})[match[2].removeprefix("lora_")] = tensor
        elif "lora_" in name or "trainable_tokens" in name:
            raise DamagedFileError(
                f"the adapter holds {tensor.name}, which cannot be merged", where=str(folder / WEIGHTS)
            )
        else:
            replaced[name] = tensor
    updates = {module: _low_rank(module, found, config, folder) for module, found in sorted(parts.items())}
    stacks = {module: _stack(module, found, config, folder) for module, found in sorted(stacked.items())}
    return Adapter(folder, updates, replaced, bool(config.get("ensure_weight_tying")), stacks)


def refuse_unlearned(adapter: Adapter) -> set[str]:
    """The modules whose update is zero.

    Raises:
        RunError: all of them are, and nothing else is saved.
    """
    zero = {module for module, update in adapter.updates.items() if not update.learned()}
    zero |= {module for module, factors in adapter.stacks.items() if not factors.learned()}
    if len(zero) == adapter.modules and not adapter.replaced:
        raise RunError(
            f"the adapter learned nothing: the update of each of its {counted(len(zero), 'module')} is zero, "
            "as before the first step of training",
            where=str(adapter.folder / WEIGHTS),
            fix="train it first, or export the base itself",
        )
    return zero


def _low_rank(module: str, found: Mapping[str, StoredTensor], config: Mapping[str, Any], folder: Path) -> LowRank:
    embedding = "embedding_A" in found or "embedding_B" in found
    prefix = "embedding_" if embedding else ""
    a, b = found.get(f"{prefix}A"), found.get(f"{prefix}B")
    magnitude = found.get("magnitude_vector")
    where = str(folder / WEIGHTS)
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise DamagedFileError(f"the adapter's tensors for {module} are no pair of factors", where=where)
    if bool(config.get("use_dora")) != (magnitude is not None) or (embedding and magnitude is not None):
        raise DamagedFileError(f"the adapter's use_dora does not fit what it holds for {module}", where=where)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    rank = a.shape[0]
    expected = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    if rank != expected:
        raise DamagedFileError(f"{CONFIG} gives {module} rank {expected:g}, its factors have {rank}", where=where)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    init = config.get("init_lora_weights")
    return LowRank(module, a, b, scaling, magnitude, embedding, init if init in SUBTRACTED_INITS else "")


def _stack_holders(config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> set[str]:
    """The ends of the names of the modules whose experts carry factors."""
    _, stacks = split_parameters([str(name) for name in config.get("target_parameters") or []], config["r"], tensors)
    return {name.rpartition(".")[0] for name in stacks}


def _ends_in(module: str, ends: set[str]) -> bool:
    return any(module == end or module.endswith(f".{end}") for end in ends)


def _stack(module: str, found: Mapping[str, StoredTensor], config: Mapping[str, Any], folder: Path) -> StackFactors:
    a, b = found.get("A"), found.get("B")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        where = str(folder / WEIGHTS)
        raise DamagedFileError(f"the adapter's tensors for {module} are no pair of factors", where=where)

    def scaling_of(name: str, rank: int) -> float:
        expected = _by_pattern(config.get("rank_pattern") or {}, name, config["r"])
        if rank != expected:
            raise DamagedFileError(f"{CONFIG} gives {name} rank {expected:g}, its factors have {rank:g}", str(folder))
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return StackFactors(module, a, b, scaling_of)


def _by_pattern(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """peft's rule: the first key that matches the module's whole name or its end from a dot on, as an expression."""
    expressions = {key: whole_or_end(key) for key in pattern}
    found = matched(expressions.values(), [module]) if pattern else {}
    for key, expression in expressions.items():
        if isinstance(fits := found[expression], str):
            raise DamagedFileError(f"{CONFIG} names {key[:80]}, {fits}", CONFIG)
        if fits:
            return pattern[key]
    return otherwise


def _settings(path: Path) -> Mapping[str, Any]:
    """adapter_config.json, its numbers and patterns checked.

    Raises:
        DamagedFileError: it is no JSON object, or a value that is reckoned with is of a wrong type.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise broken(path, f"it cannot be read ({error})") from error
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise broken(path, f"it has no number under {key}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            raise broken(path, f"its {key} does not give numbers to names")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise broken(path, f"its {key} has a pattern that is none: {error}") from error
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31


def _refuse(config: Mapping[str, Any], path: Path, *, merges: bool) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise DamagedFileError(f"the adapter is {kind}; only LoRA adapters can be merged", where=str(path))
    for key in REFUSED:
        if config.get(key):
            raise DamagedFileError(f"an adapter with {key}={config[key]} cannot be merged", where=str(path))
    if not merges:
        return
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or (init not in PLAIN_INITS and init not in SUBTRACTED_INITS):
        raise DamagedFileError(
            f"an adapter with init_lora_weights={init} cannot be merged: what it took out of the base is not saved",
            where=str(path),
        )
