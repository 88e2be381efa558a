"""Artifacts and samples for the page, from eval.json and the manifests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_kit.core.verdict import recorded_verdict
from qlora_kit.report.run_page_facts import Artifact, Sample, Survival
from qlora_kit.report.run_page_records import as_record, as_records, interval_of, number_of, numbers_of, whole_of

TRAINED = ("base", "adapter")
# The key of an interval, in a row of eval.json or in the row's `fidelity`, and the field that it is of.
INTERVALS = {
    "loss_interval": "loss",
    "loss_change_interval": "loss_change",
    "mean_kl_interval": "mean_kl",
    "same_top_interval": "same_top",
    "exact_match_interval": "task",
    "stops_interval": "stops",
}


def trained(name: str, row: Mapping[str, Any]) -> Artifact:
    """The base or the adapter, as `eval` scored it."""
    return replace(_artifact(name, name, number_of(row, "size_bytes"), row, {}), is_export=False)


def exported(name: str, size: int, manifest: Mapping[str, Any], row: Mapping[str, Any]) -> Artifact:
    """An exported file: by its row of eval.json, or else as its manifest has it.

    Args:
        size: bytes on disk.
        row: empty where eval.json has none.
    """
    scores = row or as_record(manifest.get("evaluation")) or {"fidelity": manifest.get("fidelity")}
    return replace(
        _artifact(name, str(manifest.get("format", "?")), size, scores, manifest),
        merge_base=str(as_record(manifest.get("merge")).get("base") or ""),
        merge_bases=numbers_of(manifest.get("merge_bases")),
        survival=_survival(as_record(manifest.get("survival"))),
    )


def samples_of(evaluation: Mapping[str, Any]) -> list[Sample]:
    """Held-out prompts and the answers to them, where `eval` kept any."""
    return [
        Sample(
            str(one.get("prompt", "")),
            str(one.get("expected") or ""),
            [(str(name), str(answer)) for name, answer in as_record(one.get("answers")).items()],
        )
        for one in as_records(evaluation.get("samples"))
    ]


def _artifact(
    name: str, kind: str, size: float | None, row: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Artifact:
    fit = as_record(row.get("fidelity"))
    found = {of: interval_of(fit, key) or interval_of(row, key) for key, of in INTERVALS.items()}
    return Artifact(
        name=name,
        format=kind,
        size_bytes=size,
        loss=number_of(fit, "loss"),
        mean_kl=number_of(fit, "mean_kl"),
        p99_kl=number_of(fit, "p99_kl"),
        same_top=number_of(fit, "same_top"),
        positions=whole_of(fit, "positions"),
        task=number_of(row, "exact_match"),
        stops=number_of(row, "stops"),
        tokens_per_second=number_of(row, "tokens_per_second") if row.get("answered") else None,
        seconds=number_of(manifest, "seconds"),
        verdict=recorded_verdict(manifest) if manifest else None,
        faults=_words(manifest.get("faults")),
        max_mean_kl=number_of(manifest, "max_mean_kl"),
        is_evaluated="answered" in row,
        loss_change=number_of(fit, "loss_change"),
        intervals={of: interval for of, interval in found.items() if interval is not None},
        others=_others(row),
        serve=_commands(manifest.get("serve")),
    )


def _survival(record: Mapping[str, Any]) -> Survival | None:
    kept = number_of(record, "kept")
    if kept is None:
        return None
    kinds = {str(kind): as_record(found) for kind, found in as_record(record.get("kinds")).items()}
    warning = record.get("warning")
    return Survival(
        kept=kept,
        worst_kept=number_of(record, "worst_kept"),
        kinds={kind: (number_of(found, "kept"), number_of(found, "worst_kept")) for kind, found in kinds.items()},
        warning=warning if isinstance(warning, str) else None,
    )


def _words(found: object) -> list[str]:
    return [str(one) for one in found] if isinstance(found, list) else []


def _others(row: Mapping[str, Any]) -> dict[str, float]:
    """The perplexity of a text, and the first metric of each task of lm-eval."""
    found = {}
    if (perplexity := number_of(row, "text_perplexity")) is not None:
        found["text perplexity"] = perplexity
    for task, scores in as_record(row.get("lm_eval")).items():
        metrics = [(key, value) for key, value in numbers_of(scores).items() if "_stderr" not in key]
        if metrics:
            found[f"{task} {metrics[0][0].partition(',')[0]}"] = metrics[0][1]
    return found


def _commands(serve: object) -> list[tuple[str, str]]:
    """Commands from records with `server`, `install` and `lines`, or from a mapping of servers to lines."""
    if isinstance(serve, dict):
        found = [(str(server), said) for server, said in serve.items()]
    else:
        found = [(_title(one), one.get("lines")) for one in as_records(serve)]
    lines = [(title, "\n".join(map(str, said)) if isinstance(said, list) else said) for title, said in found]
    return [(title, said) for title, said in lines if isinstance(said, str) and said]


def _title(one: Mapping[str, Any]) -> str:
    install = one.get("install")
    return f"{one.get('server', '')} ({install})" if install else str(one.get("server", ""))
