"""Lines to paste that serve an adapter beside its base."""

import json

from qlora_kit.core.shell import shell_line
from qlora_kit.export.serving.commands import PROMPT, SGLANG_SERVER, Served, Server, literal
from qlora_kit.formats.gguf.serving import LLAMA_CPP_RELEASES, OLLAMA, alias


def _peft(served: Served) -> tuple[str, ...]:
    return (
        "python - <<'EOF'",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({literal(served.root)})",
        f'model = AutoPeftModelForCausalLM.from_pretrained({literal(served.root)}, device_map="auto")',
        f'turns = [{{"role": "user", "content": "{PROMPT}"}}]',
        "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
        'given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**given.to(model.device), max_new_tokens=64)[0]))",
        "EOF",
    )


def _vllm_lora(served: Served) -> tuple[str, ...]:
    allowed = next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= served.rank), served.rank)
    lora = _pair(served, ("name", "path"))
    modules = ["--enable-lora", "--lora-modules", lora, "--max-lora-rank", allowed]
    return (shell_line(["vllm", "serve", served.base, *modules]),)


def _sglang_lora(served: Served) -> tuple[str, ...]:
    lora = ["--enable-lora", "--lora-paths", _pair(served, ("lora_name", "lora_path"))]
    return (shell_line([*SGLANG_SERVER, "--model-path", served.base, *lora, "--port", 30000]),)


def _pair(served: Served, keys: tuple[str, str]) -> str:
    """Name and folder of an adapter: `name=folder`, or JSON where that would be cut elsewhere or read as a flag."""
    values = (served.name, served.root)
    if served.name.startswith("-") or any(set(value) & set("=,") for value in values):
        return json.dumps(dict(zip(keys, values, strict=True)), ensure_ascii=False)
    return "=".join(values)


def _llama_cpp_lora(served: Served) -> tuple[str, ...]:
    return (shell_line(["llama-server", "-m", "./base.gguf", "--lora", served.path, *alias(served)]),)


SERVERS = (
    Server("transformers", "pip install peft", _peft),
    Server("vLLM", "pip install vllm", _vllm_lora),
    Server("SGLang", 'pip install "sglang[all]"', _sglang_lora),
)
GGUF_SERVERS = (Server("llama.cpp", LLAMA_CPP_RELEASES, _llama_cpp_lora), OLLAMA)
