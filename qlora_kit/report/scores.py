"""The table that `eval` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.core.units import human_bytes
from qlora_kit.report.table import print_table

COLUMNS = ("artifact", "size", "loss", "perplexity", "mean KL", "p99 KL", "same top", "exact match", "tokens/s", "")


def print_scores(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line an artifact: size, masked loss, distance from the trained model, task score, speed."""
    shown = []
    for row in rows:
        fit = row["fidelity"]
        match = row["exact_match"]
        shown.append(
            (
                row["name"],
                human_bytes(row["size_bytes"]),
                f"{fit['loss']:.4f}",
                f"{fit['perplexity']:.3f}",
                f"{fit['mean_kl']:.5f}",
                f"{fit['p99_kl']:.4f}",
                f"{fit['same_top']:.1%}",
                "-" if match is None else f"{match:.1%}",
                f"{row['tokens_per_second']:.0f}" if match is not None else "-",
                "rejected" if row["rejected"] else "",
            )
        )
    print_table(f"{title}: KL in nats against the trained model (base in 4 bit + adapter)", COLUMNS, shown)
