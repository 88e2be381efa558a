"""README.md of an artifact: what it is, how close to the trained model, what it was trained on, how to serve it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit import __version__
from qlora_kit.core.files import read_json, write_text
from qlora_kit.core.units import counted
from qlora_kit.core.verdict import Verdict
from qlora_kit.export.license import License, license_files, read_license
from qlora_kit.export.serving.commands import Served
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.export.serving.lock import LOCK, data_hashes
from qlora_kit.export.serving.markdown import block, code, plain
from qlora_kit.runs.directory import RunDirectory

MODEL_CARD = "README.md"
# key of the measured values -> what the table says, and how the number is printed
_MEASURED = {
    "loss": ("loss on held-out answers (nats a token)", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "mean_kl": ("mean KL to the trained model (nats)", ".5f"),
    "p99_kl": ("99th percentile of KL (nats)", ".4f"),
    "same_top": ("top-1 agreement", ".2%"),
    "exact_match": ("exact answers", ".1%"),
    "stops": ("answers that stop by themselves", ".1%"),
    "positions": ("positions compared", "d"),
}


def write_model_card(folder: Path, facts: ServingFacts) -> str:
    """Write README.md; returns its name."""
    write_text(folder / MODEL_CARD, model_card(facts))
    return MODEL_CARD


def model_card(facts: ServingFacts) -> str:
    """The card's text: front matter for the hub, then Markdown."""
    license = read_license(facts.base.folder)
    sections = [
        *_front_matter(facts, license),
        "",
        f"# {plain(facts.name)}",
        "",
        f"{_what(facts)} Written by qlora-kit {__version__}; `{LOCK}` says from what.",
        *_left(facts),
        *_verdict(facts),
        *_measured(facts),
        *_trained_on(facts.run),
        *_serving(facts),
        *_license(facts, license),
    ]
    return "\n".join(sections) + "\n"


def _front_matter(facts: ServingFacts, license: License) -> Iterator[str]:
    hub = facts.format.hub
    relation = "quantized" if facts.run is None and hub.relation == "finetune" else hub.relation
    trained = ("qlora",) if facts.run is not None else ()
    yield from front_matter(
        {
            "license": license.id,
            "license_name": license.name,
            "license_link": license.link,
            "base_model": facts.base.hub_id,
            "base_model_relation": relation if facts.base.hub_id else None,
            "library_name": hub.library,
            "pipeline_tag": "text-generation",
            "tags": [*trained, *hub.tags, "conversational", "qlora-kit"],
        }
    )


def front_matter(facts: Mapping[str, object]) -> list[str]:
    """What the hub reads at the head of a card, as YAML between its marks; facts that are not known are left out.

    Measured values are not among them: the hub's `EvalResult` asks for a data set of the hub, and rows are the user's.
    `ModelCardData` checks those alone and sorts the facts by its own order, so that the class below it is taken.
    """
    from huggingface_hub import CardData

    card = CardData()
    for key, value in facts.items():
        if value:
            card[key] = value
    return ["---", *card.to_yaml().splitlines(), "---"]


def _what(facts: ServingFacts) -> str:
    asked = {key: value for key, value in facts.settings.items() if value not in (None, {}, [])}
    settings = ", ".join(plain(f"{key} {value}") for key, value in asked.items())
    form = f"`{facts.format.name}`" + (f" ({settings})" if settings else "")
    at = f" at revision {code(facts.base.revision)}" if facts.base.revision else ""
    done = "fine-tuned with QLoRA" if facts.run is not None else "quantized, not fine-tuned"
    return f"{plain(facts.base.shown)}{at}, {done}, as {form}."


def _left(facts: ServingFacts) -> Iterator[str]:
    if isinstance(names := facts.unquantized.get("layers"), list) and names:
        count = f"{len(names)} of {facts.unquantized.get('of')} linear layers stay in 16 bit"
        yield from ("", f"{count}: {plain(str(facts.unquantized.get('why')))}.")
    if what := facts.uncalibrated.get("what"):
        yield from ("", f"{plain(str(what)).capitalize()}.")


def _verdict(facts: ServingFacts) -> Iterator[str]:
    reference = "the model that was trained" if facts.run is not None else "the base"
    if facts.faults:
        yield from ("", "**Rejected**, do not serve this file:", "", *(f"- {plain(fault)}" for fault in facts.faults))
    elif facts.verdict is Verdict.not_measured:
        yield from (
            "",
            f"**Not measured**: without held-out rows nothing tells how close it is to {reference}.",
        )
    elif facts.verdict is Verdict.measured:
        yield from ("", "**Measured**, without a bound: the numbers below were not held against any limit.")
    else:
        yield from ("", "**Accepted**: measured, and within its bound.")


def _measured(facts: ServingFacts) -> Iterator[str]:
    rows = list(_measured_rows(facts.fidelity))
    if not rows:
        return
    reference = "the model that was trained (base and adapter)" if facts.run is not None else "the base"
    yield from ("", "## Measured", "", f"This very file, on held-out rows, against {reference}.", "")
    yield from ("| | value |", "|---|---:|")
    for label, value in rows:
        # The rows of a base may be plain text, and there is no other model than the base.
        base = label.replace("the trained model", "the base").replace("held-out answers", "held-out rows")
        yield f"| {label if facts.run is not None else base} | {value} |"


def _measured_rows(measured: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in measured.items():
        label, form = _MEASURED.get(key, (key.replace("_", " "), ".5g"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        yield label, format(int(value) if form == "d" else value, form)


def _trained_on(run: RunDirectory | None) -> Iterator[str]:
    if run is None or not run.data.is_file():
        return
    recorded = read_json(run.data)
    yield from ("", "## Trained on", "", "| | rows | tokens | loss tokens |", "|---|---:|---:|---:|")
    for split, label in (("train", "training"), ("held_out", "held out")):
        counts: Mapping[str, Any] | None = recorded.get(split)
        if counts:
            yield f"| {label} | {counts['rows']:,} | {counts['tokens']:,} | {counts['trained_tokens']:,} |"
    yield ""
    files = (file for hashes in data_hashes(run).values() for file in hashes.items())
    for name, digest in dict.fromkeys(files):  # both splits may be of one file
        yield f"- {code(name)} sha256 {code(digest)}"
    if run.result.is_file():
        result = read_json(run.result)
        if isinstance(result.get("steps"), int | float) and isinstance(result.get("final_loss"), int | float):
            yield from (
                "",
                f"{counted(round(result['steps']), 'step')}, training loss {result['final_loss']:.4f} at the end.",
            )


UNREAD = (
    " transformers by itself does not find all weights of these files, and fills what it lacks with random numbers; "
    "`qlora-kit chat` and `qlora-kit eval` read them."
)


def served_of(facts: ServingFacts, folder: str = ".") -> Served:
    """What stands in the commands that serve an artifact, for a reader who sees it at `folder`."""
    return Served(
        name=facts.name,
        folder=folder,
        file=facts.file,
        base=facts.base.hub_id or f"./{facts.base.shown}",
        rank=_rank(facts),
        fp8_cache=facts.settings.get("kv_cache_fp8") is True,
        is_unpacked=facts.is_unpacked,
    )


def _serving(facts: ServingFacts) -> Iterator[str]:
    commands = facts.format.serve_commands(served_of(facts))
    if commands or facts.is_unpacked:
        where = "Run these in this folder." if commands else ""
        note = UNREAD if facts.is_unpacked else ""
        yield from ("", "## Serve", "", f"{where}{facts.format.serving_note(facts)}{note}".strip())
    for command in commands:
        yield from ("", f"**{command.server}** ({command.install})", "", *block(command.lines, "bash"))


def _rank(facts: ServingFacts) -> int:
    path = facts.run.adapter / "adapter_config.json" if facts.run is not None else None
    if path is None or not path.is_file():
        return 16
    config = read_json(path)
    return max([int(config.get("r") or 16), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])


def _license(facts: ServingFacts, license: License) -> Iterator[str]:
    files = ", ".join(code(path.name) for path in license_files(facts.base.folder))
    yield from (
        "",
        "## License",
        "",
        f"That of the base: {plain(license.shown)}." + (f" See {files}." if files else ""),
    )
