"""What can be run: a stack, a variant of it, a number format, a model shape and a batch; each run has a name."""

from dataclasses import dataclass

VARIANTS = {
    "qlora_kit": (("plain", "bf16"), ("fast", "bf16"), ("fast", "fp8_backward"), ("fast", "fp8")),
    "unsloth": (("default", "bf16"), ("no recompute", "bf16")),
    "trl": (("default", "bf16"),),
    "liger": (("default", "bf16"),),
}
# Known, but only run when they are asked for: the first runs out of memory at 4x2048, the others repeat a row above.
ON_DEMAND = {
    "qlora_kit": (
        ("few copies", "bf16"),
        *(("no recompute", compute) for compute in ("bf16", "fp8_backward", "fp8")),
        *(("least memory", compute) for compute in ("bf16", "fp8_backward", "fp8")),
    ),
    "trl": (("no recompute", "bf16"),),
    "liger": (("no recompute", "bf16"),),
}
PACKED = "packed-"


@dataclass(frozen=True)
class Batch:
    """Rows in one step; packed ones are short rows in as many bins of `seq_len` tokens."""

    rows: int
    seq_len: int
    packed: bool = False

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """`4x2048`, or `packed-4x2048`."""
        rows, _, seq_len = text.removeprefix(PACKED).partition("x")
        if not (rows.isdigit() and seq_len.isdigit() and int(rows) and int(seq_len)):
            raise ValueError(f"{text} is no batch: 4x2048, or {PACKED}4x2048 for short rows")
        return cls(int(rows), int(seq_len), text.startswith(PACKED))

    def __str__(self) -> str:
        return f"{PACKED if self.packed else ''}{self.rows}x{self.seq_len}"


BATCHES = tuple(Batch.parse(text) for text in ("4x2048", "1x2048", "1x8192", "1x32768", "packed-4x2048"))
QUICK = BATCHES[:1]


@dataclass(frozen=True)
class Run:
    """One measurement."""

    stack: str
    variant: str
    compute: str
    shape: str
    batch: Batch

    @classmethod
    def parse(cls, name: str) -> "Run":
        """`qlora_kit:fast:bf16:8b:4x2048`; a space in a variant may be written as an underscore.

        Raises:
            ValueError: the name has other parts, or no stack has this variant.
        """
        parts = name.split(":")
        if len(parts) != 5:
            raise ValueError(f"{name} is no run: stack:variant:compute:shape:batch")
        stack, variant, compute, shape, batch = parts
        variant = variant.replace("_", " ")
        known = VARIANTS.get(stack, ()) + ON_DEMAND.get(stack, ())
        if (variant, compute) not in known:
            choices = ", ".join(f"{stack}:{one}:{other}" for one, other in known) or ", ".join(VARIANTS)
            raise ValueError(f"{name}: there are {choices}")
        return cls(stack, variant, compute, shape, Batch.parse(batch))

    @property
    def is_ours(self) -> bool:
        """Whether the run is this package's."""
        return self.stack == "qlora_kit"

    @property
    def packs(self) -> bool:
        """Whether short rows are packed; a stack that cannot keep packed rows apart with sdpa pads them."""
        return self.batch.packed and self.stack in ("qlora_kit", "unsloth")

    @property
    def identity(self) -> dict[str, object]:
        """The first columns of a result."""
        return {
            "stack": self.stack,
            "variant": self.variant,
            "compute": self.compute,
            "shape": self.shape,
            "batch": self.batch.rows,
            "seq_len": self.batch.seq_len,
            "rows_are_short": self.batch.packed,
            "packed": self.packs,
        }

    def __str__(self) -> str:
        variant = self.variant.replace(" ", "_")
        return f"{self.stack}:{variant}:{self.compute}:{self.shape}:{self.batch}"


def every_run(shape: str, batches: tuple[Batch, ...]) -> list[Run]:
    """Each stack and variant on each batch; one batch is done by all stacks before the next begins."""
    return [
        Run(stack, variant, compute, shape, batch)
        for batch in batches
        for stack, variants in VARIANTS.items()
        for variant, compute in variants
    ]
