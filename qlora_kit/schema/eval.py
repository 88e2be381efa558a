"""Recipe group `eval`: what is scored, on how many rows."""

from dataclasses import dataclass

from qlora_kit.schema.field import Sealed, knob


@dataclass
class EvalConfig(Sealed):
    """Scoring of base, adapter, merged and every export on held-out rows."""

    artifacts: list[str] = knob(["all"], "all, or names: base, adapter, merged, and folders of exports/.")
    task_rows: int | None = knob(None, "Rows that are answered and judged; unset: every held-out row.", minimum=1)
    kl_rows: int = knob(32, "Rows on which loss and KL are measured.", unit="rows", minimum=1)
    top_tokens: int = knob(256, "Most likely tokens compared one by one; the rest is one bucket.", minimum=2)
    batch_size: int = knob(50, "Rows answered at once.", minimum=1)
    max_new_tokens: int = knob(48, "Longest answer.", unit="tokens", minimum=1)
