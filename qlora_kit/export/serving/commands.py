"""How each kind of artifact is served: a table of formats, servers and the lines to paste."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from qlora_kit.core.shell import shell_line

PROMPT = "Hello"
_SGLANG_SERVER = ("python", "-m", "sglang.launch_server")


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
        file: the GGUF file's name, or the adapter's; `.` for a folder.
        base: hub id of the base, or a path of its folder, for adapters.
        rank: of the adapter.
        fp8_cache: whether scales for an fp8 key-value cache are stored.
    """

    name: str
    folder: str = "."
    file: str = "."
    base: str = "<base model>"
    rank: int = 16
    fp8_cache: bool = False

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


def _transformers(served: Served) -> tuple[str, ...]:
    return (
        "python - <<'EOF'",
        "from transformers import pipeline",
        f'chat = pipeline("text-generation", model={_literal(served.root)}, device_map="auto")',
        f'turns = [{{"role": "user", "content": "{PROMPT}"}}]',
        'print(chat(turns, max_new_tokens=64)[0]["generated_text"][-1]["content"])',
        "EOF",
    )


def _peft(served: Served) -> tuple[str, ...]:
    return (
        "python - <<'EOF'",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(served.root)})",
        f'model = AutoPeftModelForCausalLM.from_pretrained({_literal(served.root)}, device_map="auto")',
        f'turns = [{{"role": "user", "content": "{PROMPT}"}}]',
        "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
        'given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**given.to(model.device), max_new_tokens=64)[0]))",
        "EOF",
    )


def _vllm(served: Served) -> tuple[str, ...]:
    cache = ["--kv-cache-dtype", "fp8"] if served.fp8_cache else []
    return (shell_line(["vllm", "serve", served.root, *_named(served), *cache]),)


def _vllm_lora(served: Served) -> tuple[str, ...]:
    allowed = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= served.rank), served.rank)
    lora = _pair(served, ("name", "path"))
    modules = ["--enable-lora", "--lora-modules", lora, "--max-lora-rank", allowed]
    return (shell_line(["vllm", "serve", served.base, *modules]),)


def _sglang(served: Served) -> tuple[str, ...]:
    cache = ["--kv-cache-dtype", "fp8_e4m3"] if served.fp8_cache else []
    where = ["--model-path", served.root, *_named(served)]
    return (shell_line([*_SGLANG_SERVER, *where, "--port", 30000, *cache]),)


def _sglang_lora(served: Served) -> tuple[str, ...]:
    lora = ["--enable-lora", "--lora-paths", _pair(served, ("lora_name", "lora_path"))]
    return (shell_line([*_SGLANG_SERVER, "--model-path", served.base, *lora, "--port", 30000]),)


def _named(served: Served) -> list[str]:
    """The served name as argparse takes it: one that begins with a dash only behind an equals sign."""
    flag = "--served-model-name"
    return [f"{flag}={served.name}"] if served.name.startswith("-") else [flag, served.name]


def _pair(served: Served, keys: tuple[str, str]) -> str:
    """Name and folder of an adapter: `name=folder`, or JSON where that would be cut elsewhere or read as a flag."""
    values = (served.name, served.root)
    if served.name.startswith("-") or any(set(value) & set("=,") for value in values):
        return json.dumps(dict(zip(keys, values, strict=True)), ensure_ascii=False)
    return "=".join(values)


def _llama_cpp(served: Served) -> tuple[str, ...]:
    return (shell_line(["llama-server", "-m", served.path, *_alias(served)]),)


def _llama_cpp_lora(served: Served) -> tuple[str, ...]:
    return (shell_line(["llama-server", "-m", "./base.gguf", "--lora", served.path, *_alias(served)]),)


def _alias(served: Served) -> list[str]:
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


def _literal(text: str) -> str:
    """A text as Python reads it between double quotes; no line end is left that would end the lines' own text."""
    return json.dumps(text, ensure_ascii=False)


_QUANTIZED = "pip install transformers gptqmodel optimum"
_VLLM = ("vLLM", "pip install vllm", _vllm)
_SGLANG = ("SGLang", 'pip install "sglang[all]"', _sglang)
_OLLAMA = ("Ollama", "https://ollama.com/download", _ollama)

# format -> server, what to install, lines
_TABLE: dict[str, tuple[tuple[str, str, Lines], ...]] = {
    "merged": (("transformers", "pip install transformers accelerate", _transformers), _VLLM, _SGLANG),
    "gptq": (("transformers", _QUANTIZED, _transformers), _VLLM, _SGLANG),
    "awq": (("transformers", _QUANTIZED, _transformers), _VLLM, _SGLANG),
    "awq_gemv": (("transformers", _QUANTIZED, _transformers),),
    "compressed": (("transformers", "pip install transformers compressed-tensors", _transformers), _VLLM, _SGLANG),
    "bnb": (
        ("transformers", "pip install transformers bitsandbytes", _transformers),
        ("vLLM", "pip install vllm bitsandbytes", _vllm),
    ),
    "gguf": (
        ("llama.cpp", "https://github.com/ggml-org/llama.cpp/releases", _llama_cpp),
        _OLLAMA,
        ("LM Studio", "https://lmstudio.ai", _lm_studio),
    ),
    "adapter": (
        ("transformers", "pip install peft", _peft),
        ("vLLM", "pip install vllm", _vllm_lora),
        ("SGLang", 'pip install "sglang[all]"', _sglang_lora),
    ),
    "adapter_gguf": (("llama.cpp", "https://github.com/ggml-org/llama.cpp/releases", _llama_cpp_lora), _OLLAMA),
}
FORMATS = tuple(_TABLE)


def serve_commands(kind: str, served: Served) -> list[ServeCommand]:
    """The servers that read a format, with the lines to paste; empty for a format that is not in the table.

    Args:
        kind: a key of the table: merged, gptq, awq, awq_gemv, compressed, bnb, gguf, adapter, adapter_gguf.
    """
    return [ServeCommand(server, install, lines(served)) for server, install, lines in _TABLE.get(kind, ())]
