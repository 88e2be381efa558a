"""Lines to paste that serve a model folder, and what stands in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from qlora_kit.core.shell import shell_line

PROMPT = "Hello"
SGLANG_SERVER = ("python", "-m", "sglang.launch_server")


@dataclass(frozen=True)
class ServeCommand:
    """One server: what to install, and the lines to paste."""

    server: str
    install: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Served:
    """What stands in the lines.

    Attributes:
        name: the model's name for clients.
        folder: of the artifact, as the reader of the lines sees it.
        file: name of the file that readers open; `.` for a folder.
        base: hub id of the base, or a path of its folder, for adapters.
        rank: of the adapter.
        fp8_cache: whether scales for an fp8 key-value cache are stored.
        is_unpacked: transformers reads it only with its weights unpacked by the kit.
    """

    name: str
    folder: str = "."
    file: str = "."
    base: str = "<base model>"
    rank: int = 16
    fp8_cache: bool = False
    is_unpacked: bool = False

    @property
    def path(self) -> str:
        """The file, or the folder where that is what readers open."""
        joined = PurePosixPath(self.folder) / self.file
        return str(joined) if joined.is_absolute() or str(joined) == "." else f"./{joined}"

    @property
    def root(self) -> str:
        """The folder."""
        pure = PurePosixPath(self.folder)
        return str(pure) if pure.is_absolute() or str(pure) == "." else f"./{pure}"


Lines = Callable[[Served], tuple[str, ...]]


@dataclass(frozen=True)
class Server:
    """A program that reads a format.

    Attributes:
        install: the line that installs it, or where it is found.
        lines: to paste, for an artifact.
    """

    name: str
    install: str
    lines: Lines

    def command(self, served: Served) -> ServeCommand:
        """The lines for one artifact."""
        return ServeCommand(self.name, self.install, self.lines(served))


def _transformers_lines(served: Served) -> tuple[str, ...]:
    """Python that loads a folder and answers once."""
    return (
        "python - <<'EOF'",
        "from transformers import pipeline",
        f'chat = pipeline("text-generation", model={literal(served.root)}, device_map="auto")',
        f'turns = [{{"role": "user", "content": "{PROMPT}"}}]',
        'print(chat(turns, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
        "EOF",
    )


def _vllm_lines(served: Served) -> tuple[str, ...]:
    cache = ["--kv-cache-dtype", "fp8"] if served.fp8_cache else []
    return (shell_line(["vllm", "serve", served.root, *_named(served), *cache]),)


def _sglang_lines(served: Served) -> tuple[str, ...]:
    cache = ["--kv-cache-dtype", "fp8_e4m3"] if served.fp8_cache else []
    where = ["--model-path", served.root, *_named(served)]
    return (shell_line([*SGLANG_SERVER, *where, "--port", 30000, *cache]),)


def _named(served: Served) -> list[str]:
    """The served name as argparse takes it: one that begins with a dash only behind an equals sign."""
    flag = "--served-model-name"
    return [f"{flag}={served.name}"] if served.name.startswith("-") else [flag, served.name]


def literal(text: str) -> str:
    """A text as Python reads it between double quotes; no line end is left that would end the lines' own text."""
    return json.dumps(text, ensure_ascii=False)


SERVE_VLLM = Server("vLLM", "pip install vllm", _vllm_lines)
SERVE_SGLANG = Server("SGLang", 'pip install "sglang[all]"', _sglang_lines)


TRANSFORMERS = "transformers"


def transformers(*packages: str) -> Server:
    """transformers, with the packages that it needs beside it for a format."""
    return Server(TRANSFORMERS, " ".join(("pip install transformers", *packages)), _transformers_lines)
