"""Lines to paste that serve a GGUF file."""

import re
from pathlib import PurePosixPath

from qlora_kit.core.shell import shell_line
from qlora_kit.export.serving.commands import PROMPT, Served, Server

LLAMA_CPP_RELEASES = "https://github.com/ggml-org/llama.cpp/releases"


def _llama_cpp(served: Served) -> tuple[str, ...]:
    return (shell_line(["llama-server", "-m", served.path, *alias(served)]),)


def alias(served: Served) -> list[str]:
    """The flags of llama-server that every model gets."""
    return ["--alias", served.name, "--jinja", "--port", "8080"]


def _ollama(served: Served) -> tuple[str, ...]:
    modelfile = PurePosixPath(served.folder) / "Modelfile"
    name = ollama_name(served.name)
    return (shell_line(["ollama", "create", name, "-f", modelfile]), shell_line(["ollama", "run", name, PROMPT]))


def ollama_name(name: str) -> str:
    """The nearest name that Ollama takes (types/model/name.go): letters, digits, _ - and single dots, 80 at most."""
    return re.sub(r"[^A-Za-z0-9_-]+", lambda found: "." if found[0] == "." else "_", name).lstrip("-.")[:80] or "model"


def _lm_studio(served: Served) -> tuple[str, ...]:
    return (shell_line(["lms", "import", "--copy", served.path]), "lms load")


OLLAMA = Server("Ollama", "https://ollama.com/download", _ollama)
SERVERS = (
    Server("llama.cpp", LLAMA_CPP_RELEASES, _llama_cpp),
    OLLAMA,
    Server("LM Studio", "https://lmstudio.ai", _lm_studio),
)
