"""Every line to serve an artifact is a known command with flags of a table, or Python that compiles."""

import ast
import importlib.util
import shlex
from collections import Counter

import pytest

from qlora_kit.export.serving.commands import FORMATS, Served, serve_commands

# Program -> the flags of it that cards may hold; beside each, where they were looked up.
FLAGS = {
    # https://unsloth.ai/docs/basics/inference-and-deployment/vllm-guide/vllm-engine-arguments; the served name: in use
    "vllm": {"--served-model-name", "--kv-cache-dtype", "--enable-lora", "--lora-modules", "--max-lora-rank"},
    # https://docs.sglang.io/advanced_features/lora.html; the served name and the cache's type were not looked up
    "python": {
        *("-m", "--model-path", "--served-model-name"),
        *("--port", "--kv-cache-dtype", "--enable-lora", "--lora-paths"),
    },
    # https://www.mintlify.com/ggml-org/llama.cpp/api/rest/overview; --alias, --jinja and --lora: in use
    "llama-server": {"-m", "--alias", "--jinja", "--port", "--lora"},
    # https://www.mintlify.com/ollama/ollama/cli/create
    "ollama": {"-f"},
    # in use
    "lms": {"--copy"},
    "pip": set(),
}
VERBS = {"vllm": {"serve"}, "ollama": {"create", "run"}, "lms": {"import", "load"}, "pip": {"install"}}
NAMES = ("plain", "a b", "it's", 'say "x"', "$(touch x)", "`x`", "é 漢", "-x")


def fault_of(line: str) -> str:
    """What is wrong with a line of a shell; empty for nothing."""
    program, *rest = shlex.split(line)
    if program not in FLAGS:
        return f"the program {program} is in no table"
    if program in VERBS and rest[:1] and rest[0] not in VERBS[program]:
        return f"{program} has no {rest[0]}"
    unknown = [word for word in rest if word.startswith("--") and word not in FLAGS[program]]
    return f"{program} has no {unknown}" if unknown else ""


def python_fault_of(lines: list[str]) -> str:
    """What is wrong with a snippet: it does not compile, or a library that is here has not what it imports."""
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom) and importlib.util.find_spec(str(node.module)) is not None:
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            if missing:
                return f"{node.module} has no {missing}"
    return ""


def parts(lines: list[str]) -> tuple[list[str], list[str]]:
    """Lines of a shell, and those of the Python between its marks."""
    if not lines[0].endswith("<<'EOF'"):
        return lines, []
    assert lines[-1] == "EOF"
    return [], lines[1:-1]


def test_lines_of_cards(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for kind in FORMATS:
        for name in NAMES:
            file = f"{name}.gguf" if "gguf" in kind else "."
            served = Served(name, ".", file, base=f"o/{name}", rank=16, fp8_cache=True)
            for command in serve_commands(kind, served):
                shell, python = parts(list(command.lines))
                installs = [command.install] if command.install.startswith("pip ") else []
                faults = [fault_of(line) for line in (*shell, *installs)]
                counts["found"] += len(faults) + bool(python)
                counts["looked up"] += len(faults)
                if python:
                    faults.append(python_fault_of(python))
                    counts["compiled"] += 1
                wrong += [f"{kind}, {command.server}: {fault}" for fault in faults if fault]
                words = [word for line in shell for word in shlex.split(line)]
                given = {name, f"{name}=.", served.path, f"o/{name}"}
                assert python or given & set(words) or command.server == "LM Studio", words
    with capsys.disabled():
        print("\nlines of cards: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    assert not wrong, "\n".join(wrong)
    assert counts["compiled"] > 30


@pytest.mark.parametrize(
    "line", ["vllm serve . --served-model-nam x", "vllm sreve .", "llama-servr -m x", "ollama run x --port 1"]
)
def test_a_misspelt_line_is_found(line: str) -> None:
    assert fault_of(line)


def test_a_snippet_that_imports_nothing_of_the_name_is_found() -> None:
    assert python_fault_of(["from transformers import pipelin"])
