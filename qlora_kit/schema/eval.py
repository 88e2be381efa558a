"""Recipe group `eval`: what is scored, on how many rows."""

from dataclasses import dataclass

from qlora_kit.schema.field import Sealed, setting


@dataclass
class EvalConfig(Sealed):
    """Scoring of base, adapter, merged and every export on held-out rows."""

    artifacts: list[str] = setting(["all"], "all, or names: base, adapter, merged, and folders of exports/.")
    task_rows: int | None = setting(None, "Rows that are answered and judged; unset: every held-out row.", minimum=1)
    kl_rows: int = setting(32, "Rows on which loss and KL are measured.", unit="rows", minimum=1)
    top_tokens: int = setting(256, "Most likely tokens compared one by one; the rest is one bucket.", minimum=2)
    batch_size: int = setting(50, "Rows answered at once.", minimum=1)
    max_new_tokens: int = setting(48, "Longest answer.", unit="tokens", minimum=1)
    eos_rows: int = setting(
        0, "Where there is no task: rows answered to see whether answers end with an end-of-sequence token.", minimum=0
    )
    text_file: str | None = setting(None, "A UTF-8 text whose perplexity is measured, such as wikitext's test split.")
    text_window: int = setting(512, "Tokens of the text that are read at once.", unit="tokens", minimum=2)
    text_stride: int | None = setting(
        None, "From one window to the next, each token still counted once; unset: no overlap.", unit="tokens", minimum=1
    )
    text_windows: int | None = setting(32, "Windows from the start of the text; null: all of it.", minimum=1)
    lm_eval: list[str] = setting([], "Tasks of lm-evaluation-harness: names, YAML files, or folders of them.")
    lm_eval_limit: int | None = setting(None, "Rows of each of those tasks; unset: all.", unit="rows", minimum=1)
