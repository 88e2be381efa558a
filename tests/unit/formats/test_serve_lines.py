"""Every line to serve an artifact is a known command with flags of a table, or Python that compiles."""

import argparse
import ast
import importlib.util
import json
import shlex
from collections import Counter

import pytest

from qlora_kit.export.serving.commands import Served
from qlora_kit.formats.gguf.serving import ollama_name
from qlora_kit.formats.registry import FORMATS

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
NAMES = ("plain", "a b", "it's", 'say "x"', "$(touch x)", "`x`", "é 漢", "-x", "--help", "a=b,c")


def fault_of(line: str) -> str:
    """What is wrong with a line of a shell; empty for nothing."""
    program, *rest = shlex.split(line)
    if program not in FLAGS:
        return f"the program {program} is in no table"
    if program in VERBS and rest[:1] and rest[0] not in VERBS[program]:
        return f"{program} has no {rest[0]}"
    # llama.cpp takes what follows a name's flag as it is (common/arg.cpp)
    words = [word for before, word in zip([program, *rest], rest, strict=False) if before != "--alias"]
    flags = {word.split("=")[0] for word in words if word.startswith("-")}
    unknown = sorted(flags - FLAGS[program])
    return f"{program} has no {unknown}" if unknown else ""


def name_of(words: list[str]) -> str:
    """The served name, as the program of a line reads it."""
    lora = argparse.ArgumentParser(prefix_chars="-", allow_abbrev=False)
    lora.add_argument("--served-model-name", nargs="?")
    lora.add_argument("--lora-modules", "--lora-paths", nargs="+")
    if words[0] == "ollama":
        assert not words[2].startswith("-")
        return words[2]
    if words[0] == "llama-server":  # takes the next word as it is
        return words[words.index("--alias") + 1]
    found, _ = lora.parse_known_args(words)
    if found.lora_modules is None:
        return str(found.served_model_name)
    (pair,) = found.lora_modules
    if pair.startswith("{"):
        read = json.loads(pair)
        return str(read.get("name", read.get("lora_name")))
    name, _ = pair.split("=")
    return str(name)


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
            for command in FORMATS[kind].serve_commands(served):
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
                assert python or command.server == "LM Studio" or name_of(words) in (name, ollama_name(name)), words
    with capsys.disabled():
        print("\nlines of cards: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    assert not wrong, "\n".join(wrong)
    assert counts["compiled"] > 30


def test_a_folder_and_a_base_that_begin_with_a_dash_are_no_flags() -> None:
    served = Served("m", "-x", "-m.gguf", base="./-base")
    found = {
        f"{kind}, {command.server}": command.lines
        for kind in ("gguf", "adapter")
        for command in FORMATS[kind].serve_commands(served)
    }
    assert found["gguf, llama.cpp"][0].startswith("llama-server -m ./-x/-m.gguf ")
    assert found["gguf, Ollama"][0] == "ollama create m -f ./-x/Modelfile"
    assert found["gguf, LM Studio"][0] == "lms import --copy ./-x/-m.gguf"
    assert found["adapter, vLLM"][0].startswith("vllm serve ./-base --enable-lora --lora-modules m=./-x ")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("gguf_q4_k_m", "gguf_q4_k_m"),
        ("a.b-c", "a.b-c"),
        ("a b", "a_b"),
        ("-x", "x"),
        ("--help", "help"),
        ("..a..b", "_a_b"),
        ("a:b/c", "a_b_c"),
        ("é 漢", "_"),
        ("---", "model"),
        ("x" * 100, "x" * 80),
    ],
)
def test_ollama_is_given_a_name_that_it_takes(name: str, taken: str) -> None:
    assert ollama_name(name) == taken
    create, run = FORMATS["gguf"].serve_commands(Served(name))[1].lines
    assert create == f"ollama create {taken} -f Modelfile"
    assert run == f"ollama run {taken} Hello"


@pytest.mark.parametrize(
    "line", ["vllm serve . --served-model-nam x", "vllm sreve .", "llama-servr -m x", "ollama run x --port 1"]
)
def test_a_misspelled_line_is_found(line: str) -> None:
    assert fault_of(line)


def test_a_snippet_that_imports_nothing_of_the_name_is_found() -> None:
    assert python_fault_of(["from transformers import pipelin"])
