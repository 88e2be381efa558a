"""The map of the engine names every file that there is, and none that there is not."""

import re
from pathlib import Path

import qlora_kit.engine


def test_the_map_names_every_file_once_and_no_other():
    root = Path(qlora_kit.engine.__file__).parent
    reading_order = qlora_kit.engine.__doc__.partition("The order to read it in:")[2]
    files = {path.relative_to(root) for path in root.rglob("*.py") if path.name != "__init__.py"}
    # An operation that is a folder stands for its files.
    expected = sorted("glu/" if "glu" in path.parts else path.name for path in files)
    assert sorted(re.findall(r"\w+\.py|glu/", reading_order)) == expected
    assert set(re.findall(r"^    (\w+)/", reading_order, re.M)) == {path.parts[0] for path in files if path.parts[1:]}


def test_functions_of_the_picture_exist():
    picture = qlora_kit.engine.__doc__.partition("The order to read it in:")[0]
    source = "\n".join(path.read_text() for path in Path(qlora_kit.engine.__file__).parent.rglob("*.py"))
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)|^(\w+) = Op\(", source, re.M))
    names = {name for pair in defined for name in pair if name}
    told = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\b(?:[A-Z][a-z]+){2,}\b", picture))
    variables = {"d_h", "d_xa", "d_p", "d_gate", "d_up", "d_x", "d_a", "d_q", "d_k", "d_v", "d_y", "keep_all"}
    assert told - names <= variables | {"attention_blocks"}
