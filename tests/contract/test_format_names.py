"""Names of export formats stand in the package below `formats/` alone; the rest asks the registry."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qlora_kit"
WORDS = re.compile(
    r"""gguf|gptq|awq|nvfp4|mxfp4|llmcompressor|compressed[-_ ]tensors|["'](?:bnb|compressed)["']""", re.I
)
# A recipe is named after what it writes, and its keys after their group: `gguf_q4_k_m`, `export.gptq.gptq_4bit`.
RECIPES = sorted((path.stem for path in (ROOT / "recipes" / "export").glob("*.yaml")), key=len, reverse=True)
OF_RECIPES = re.compile(rf"\bexport\.\w+\.|\b(?:{'|'.join(RECIPES)})\b")
# Rooms that name formats because that is what they are for.
MEANT = {
    "families/": "a family says how its layers lie in each format",
    "model/microscaled.py": "a base may be stored in a format that files are written in too",
    "weights/microscaled.py": "the same, below every room that reads weights",
    "schema/export.py": "the typed settings of each format, below every room that reads them",
}


def named(text: str) -> int:
    """How often a text names a format, recipes aside."""
    return len(WORDS.findall(OF_RECIPES.sub("", text)))


def test_names_of_formats_stand_below_formats(capsys: pytest.CaptureFixture[str]) -> None:
    files = (path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "formats")
    found = {path.relative_to(PACKAGE).as_posix(): named(path.read_text("utf-8")) for path in files}
    found = {path: count for path, count in found.items() if count}
    found = {path: count for path, count in found.items() if not path.startswith(tuple(MEANT))}
    with capsys.disabled():
        print(f"\nnames of formats outside formats/: {sum(found.values())}, {' and '.join(MEANT)} aside")
    assert found == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('if job.format == "gguf":', 1),
        ("from qlora_kit.formats.awq.layout import KINDS", 1),
        ('method == "compressed"', 1),
        ("compressed files of rows", 0),
        ("bnb_4bit_quant_type", 0),
        ("qlora-kit export run=latest export=gguf_q4_k_m", 0),
        ("export=gptq_4bit export.gptq.gptq_4bit.group_size=64", 0),
    ],
)
def test_what_counts_as_a_name(text: str, count: int) -> None:
    assert named(text) == count
