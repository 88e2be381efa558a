"""The Modelfile beside a GGUF file, so that `ollama create` makes the model that was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.core.files import write_text
from qlora_kit.data.template.ollama import MODELFILE, Modelfile, can_say
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.export.serving.generation_config import base_generation, served_stop_ids
from qlora_kit.formats.gguf.ollama_template import OllamaTemplate, ollama_template

# generation_config.json -> Modelfile
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile_of(facts: ServingFacts, base: str | None = None) -> Modelfile:
    """The Modelfile of a GGUF artifact, or of a GGUF adapter on top of the base in another file."""
    chosen = ollama_template(facts.tokenizer)
    if isinstance(chosen, OllamaTemplate) and not can_say(chosen.template + "\n" + (chosen.system or "")):
        chosen = "it holds a text with quotes that a Modelfile cannot hold"
    source = f"./{facts.file}"
    adapter = None
    comments = [f"{facts.name}: made by qlora-kit from {facts.base.shown}", *_comments(chosen)]
    if base is not None:
        adapter, source = source, base
        comments.append("FROM names the base as a GGUF file; put it beside this file, or change the path.")
    known = chosen if isinstance(chosen, OllamaTemplate) else None
    stops = _stops(facts)
    told = [("stop", text) for text in stops if can_say(text)]
    comments += [f"Ollama cannot be told to stop at the token {text}." for text in stops if not can_say(text)]
    return Modelfile(
        source=source,
        comments=tuple(comments),
        template=known.template if known else None,
        system=known.system if known else None,
        parameters=(*told, *_sampling(base_generation(facts.base.folder))),
        adapter=adapter,
    )


def write_modelfile(folder: Path, facts: ServingFacts, base: str | None = None) -> str:
    """Write the Modelfile; returns its name."""
    write_text(folder / MODELFILE, modelfile_of(facts, base).text())
    return MODELFILE


def _comments(chosen: OllamaTemplate | str) -> list[str]:
    if isinstance(chosen, str):
        return [
            f"No TEMPLATE: {chosen}.",
            "Ollama does not read the Jinja template inside the GGUF file. It takes the nearest of its own, or none:",
            "compare its prompts with the trained ones, or serve the file with llama.cpp, which does read it.",
        ]
    lines = [f"TEMPLATE: {chosen.family}; it wrote {chosen.tried} trial conversations as the trained template does."]
    if chosen.trims:
        lines.append("The trained template cuts blanks around texts, which this language cannot: send texts without.")
    return lines


def _stops(facts: ServingFacts) -> list[str]:
    ids = served_stop_ids(facts.base.folder, facts.tokenizer)
    return [str(facts.tokenizer.convert_ids_to_tokens(token)) for token in ids]


def _sampling(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The base's sampling settings in Ollama's names; a base that says not to sample is served at temperature 0."""
    if settings.get("do_sample") is False:
        return [("temperature", "0")]
    stated = {ours: settings.get(theirs) for theirs, ours in _SAMPLING.items()}
    return [(name, str(value)) for name, value in stated.items() if isinstance(value, int | float)]
