"""What a page shows of a run or of the exports of a base, as it was read; whatever they lack is None or empty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.verdict import Verdict
from qlora_kit.schema.root import ExportRecipe, TrainRecipe


@dataclass(frozen=True)
class Missing:
    """Something that the run has not, or what is wrong with it, and the command that makes it."""

    what: str
    fix: str = ""


@dataclass(frozen=True)
class Source:
    """Rows of one source of a split; tokens are counted without padding."""

    split: str
    name: str
    rows: int | None
    tokens: int | None
    trained_tokens: int | None
    skipped: int | None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Training or held-out rows."""

    name: str
    rows: int | None
    tokens: int | None
    trained_tokens: int | None
    longest_row: int | None
    max_tokens: int | None
    long_rows: Mapping[str, int] = field(default_factory=dict)
    sources: Sequence[Source] = ()


@dataclass(frozen=True)
class Survival:
    """The share of what was learned that is left in a file's weights: 1 is all of it, 0 none.

    Attributes:
        kept: of all weights together.
        worst_kept: of the weight that kept the least.
        kinds: `kept` and `worst_kept` by kind of layer, such as q_proj.
        warning: what export said of it, and after the first line what to do about it; empty where all is well, and None
            in records that do not tell.
    """

    kept: float
    worst_kept: float | None = None
    kinds: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    warning: str | None = None


@dataclass(frozen=True)
class Artifact:
    """The base, the adapter, or an exported file, with what was measured on held-out rows. KL and loss in nats.

    Attributes:
        format: that its manifest names; of the base and the adapter, their names.
        is_export: whether it is a file to serve, neither the base nor the run's own adapter.
        positions: tokens that the loss and the KL are means of.
        task: share of right answers.
        stops: share of answers that ended by themselves.
        seconds: to write it.
        verdict: on a file; None for the base and the adapter.
        faults: why, in words; a record that names none was rejected for its KL.
        is_evaluated: whether `eval` scored it; else the numbers are those of the export.
        loss_change: loss less that of the adapter on the same tokens.
        intervals: lowest and highest value at 95% confidence, by the name of the field.
        others: further scores by name, such as the perplexity of a text or a task of lm-eval.
        serve: a server and what to install for it, in words, and the lines to paste.
        merge_base: name of the base that the adapter was merged into, or empty.
        merge_bases: held-out loss by the base that was tried; empty where there was no choice.
        survival: None where the weights were not read back.
    """

    name: str
    format: str
    is_export: bool = True
    size_bytes: float | None = None
    loss: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None
    same_top: float | None = None
    positions: int | None = None
    task: float | None = None
    stops: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    verdict: Verdict | None = None
    faults: Sequence[str] = ()
    max_mean_kl: float | None = None
    is_evaluated: bool = False
    loss_change: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    serve: Sequence[tuple[str, str]] = ()
    merge_base: str = ""
    merge_bases: Mapping[str, float] = field(default_factory=dict)
    survival: Survival | None = None

    @property
    def rejected(self) -> bool:
        """Whether it must not be served."""
        return self.verdict is Verdict.rejected


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with answers by the name of who gave them."""

    prompt: str
    expected: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Environment:
    """Versions and hardware."""

    python: str = ""
    platform: str = ""
    cpu_count: int | None = None
    gpus: Sequence[str] = ()
    cuda: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What the files are compared with.

    Attributes:
        name: its name among the artifacts.
        said: in a sentence.
        unit: what loss and KL are means over.
        labels: words for the artifacts that are no files, by name.
    """

    name: str
    said: str
    unit: str
    labels: Mapping[str, str]


THE_TRAINED = Reference(
    "adapter",
    "the model that was trained, the base in its training format with the adapter on it",
    "trained tokens of held-out rows",
    {"base": "before", "adapter": "after"},
)
THE_BASE = Reference("base", "the base in 16 bit", "tokens of held-out rows", {"base": "reference"})


@dataclass(frozen=True)
class Untrained:
    """What is known of a base that was never trained.

    Attributes:
        base: that export was given; empty where export.yaml cannot be read.
        recipe: None where export.yaml is of another version.
        calibration: what the rows to calibrate on were, in words.
        calibration_rows: how many of the kit's general text; None for rows of data.
        scored_rows: how many others of that text were scored on.
        row_tokens: length of each.
    """

    base: str = ""
    recipe: ExportRecipe | None = None
    calibration: str = ""
    calibration_rows: int | None = None
    scored_rows: int | None = None
    row_tokens: int | None = None


@dataclass(frozen=True)
class RunPage:
    """A run, or the exports of a base that was never trained.

    Attributes:
        path: of its directory, as a command would name it.
        started: date and time, or empty.
        recipe: None where recipe.yaml is of another version, and for a base.
        recipe_yaml: what was composed, for a base that of its export.
        untrained: of a base; None for a run.
        metrics: one mapping a logged step.
        result: numbers that result.json holds; empty before the run ended.
        optimizer: that ran; empty where nothing tells.
        warnings: what training said at its end of its own result.
        reach: what training said at its start of what LoRA reaches and what stays in 16 bit.
    """

    path: str
    name: str
    started: str
    is_finished: bool
    recipe: TrainRecipe | None
    recipe_yaml: str
    overrides: Sequence[str]
    environment: Environment
    metrics: Sequence[Mapping[str, float]]
    result: Mapping[str, float]
    splits: Sequence[Split]
    artifacts: Sequence[Artifact]
    samples: Sequence[Sample]
    missing: Sequence[Missing]
    untrained: Untrained | None = None
    optimizer: str = ""
    warnings: Sequence[str] = ()
    reach: Sequence[str] = ()

    @property
    def reference(self) -> Reference:
        """What the files are compared with."""
        return THE_TRAINED if self.untrained is None else THE_BASE

    def line(self, verb: str, key: str, *more: str) -> str:
        """A command on this directory, to paste."""
        return shell_line(["qlora-kit", verb, override(key, self.path), *more])

    @property
    def exports(self) -> list[Artifact]:
        """Files to serve."""
        return [artifact for artifact in self.artifacts if artifact.is_export]
