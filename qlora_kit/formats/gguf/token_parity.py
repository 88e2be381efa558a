"""The token contract of a GGUF file in llama.cpp, and of the Modelfile beside it in Ollama."""

from pathlib import Path

from qlora_kit.data.template.ollama import MODELFILE, Modelfile
from qlora_kit.data.template.probes import as_turns, composed, stripped
from qlora_kit.evaluation.token_parity.compare import (
    Failure,
    Messages,
    Rewriting,
    TokenParity,
    Trained,
    compare_all,
    judge_stops,
)
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.stops import gguf_stops

LLAMA_CPP, OLLAMA = "llama.cpp", "Ollama's Modelfile"


# What llama.cpp and Ollama leave to their clients, and what a client does instead.
_NOT_COMPOSED = "does not join letters and accents as the trained tokenizer does: send text in Unicode's form NFC"
_NOT_TRIMMED = "cannot cut blanks around texts as the trained template does: send texts without"
_LLAMA_CPP_LIMITS: dict[str, Rewriting] = {_NOT_COMPOSED: composed}
_OLLAMA_LIMITS: dict[str, Rewriting] = {_NOT_COMPOSED: composed, _NOT_TRIMMED: stripped}


def check_gguf(contract: TokenParity, trained: Trained, folder: Path, file: Path) -> None:
    """Compare llama.cpp's own template, tokenizer and stop tokens, and the Modelfile's template and stop lines."""
    with LlamaCppModel(file) as model:

        def read(messages: Messages) -> list[int]:
            return model.tokenize(model.apply_template(as_turns(messages)), add_special=True, parse_special=True)

        compare_all(contract, trained, LLAMA_CPP, read, _LLAMA_CPP_LIMITS)
        judge_stops(contract, trained, LLAMA_CPP, gguf_stops(file))
        if (folder / MODELFILE).is_file():
            _check_modelfile(contract, trained, folder, model)


def _check_modelfile(contract: TokenParity, trained: Trained, folder: Path, model: LlamaCppModel) -> None:
    try:
        modelfile = Modelfile.read((folder / MODELFILE).read_text(encoding="utf-8"))
    except ValueError as error:
        contract.failures.append(Failure(OLLAMA, "Modelfile", str(error)))
        return
    if modelfile.source.startswith((".", "/")) and not (folder / modelfile.source).is_file():
        contract.failures.append(Failure(OLLAMA, "Modelfile", f"FROM names {modelfile.source}, which is not there"))
    _check_stop_lines(contract, trained, modelfile, model)
    if modelfile.template is None:
        contract.notes.append(f"{OLLAMA} has no TEMPLATE, so Ollama's prompts were not compared")
        return

    def read(messages: Messages) -> list[int]:
        return model.tokenize(modelfile.prompt(messages), add_special=True, parse_special=True)

    compare_all(contract, trained, OLLAMA, read, _OLLAMA_LIMITS)


def _check_stop_lines(contract: TokenParity, trained: Trained, modelfile: Modelfile, model: LlamaCppModel) -> None:
    ids = {text: model.tokenize(text, add_special=False, parse_special=True) for text in modelfile.stops}
    for text, tokens in ids.items():
        if len(tokens) != 1 or tokens[0] not in trained.stop_ids:
            what = f"PARAMETER stop {text!r} is token {tokens}, which is no stop token"
            contract.failures.append(Failure(OLLAMA, "end of generation", what))
    if trained.closing is not None and [trained.closing] not in ids.values():
        closing = trained.tokenizer.convert_ids_to_tokens(trained.closing)
        what = f"no PARAMETER stop {closing!r}, with which training closed answers"
        contract.failures.append(Failure(OLLAMA, "end of generation", what))
