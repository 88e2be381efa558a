"""Names of model families stand in the package below `families/` alone; the rest asks what a family says."""

import re
from pathlib import Path

import pytest

from qlora_kit.families.registry import CHAT_FORMATS, FAMILIES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qlora_kit"
# Families are named with their versions, such as qwen3 and hunyuan_v1; the words are theirs without those.
STEMS = {
    re.findall(r"^[a-z]+(?:_(?!v?\d)[a-z]+)*", name)[0] for name in (*FAMILIES, *(one.name for one in CHAT_FORMATS))
} - {"chatml"}
WORDS = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(sorted(STEMS))})(?![a-z])")
# A recipe is named after what it trains.
RECIPES = {path.stem for path in (ROOT / "recipes").rglob("*.yaml") if WORDS.search(path.stem)}
# Products whose names hold that of a family.
PRODUCTS = (
    r"llama\.cpp|llama[-_](?:cpp|server|library|lora|quant|vocab|adapter|\w+)|llama\.h|llama-factory"
    r"|Llama(?:Cpp\w*|FileType)"
)
ASIDE = re.compile(rf"\b(?:{'|'.join(sorted(RECIPES, key=len, reverse=True))})\b|{PRODUCTS}", re.I)


def named(text: str) -> int:
    """How often a text names a family, recipes and products aside."""
    return len(WORDS.findall(ASIDE.sub("", text)))


def test_names_of_families_stand_below_families(capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "families"]
    found = {path.relative_to(PACKAGE).as_posix(): named(path.read_text("utf-8")) for path in files}
    found = {path: count for path, count in found.items() if count}
    with capsys.disabled():
        print(f"\nnames of families outside families/: {sum(found.values())}, in {len(files)} files")
    assert len(files) > 300
    assert found == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('if config["model_type"] == "gemma3_text":', 1),
        ("from transformers import LlamaConfig, Qwen3DecoderLayer", 2),
        ("as Qwen3 and Phi-4 have it", 2),
        ("llama.cpp's `llama_batch` in llama.h", 0),
        ("qlora-kit train experiment=llama3_1_8b_chat_24gb", 0),
        ("Ollama, philosophy", 0),
    ],
)
def test_what_counts_as_a_name(text: str, count: int) -> None:
    assert named(text) == count
