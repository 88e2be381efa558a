"""llama.cpp's own Python converter, for the families that the kit has no GGUF rules of its own for.

The package auto-round carries it. It runs in a process of its own, to 16 bit, and what it writes is quantized by the
kit like any other model.

    package.py     where it lies, and which architectures it knows, without importing it
    child.py       the program of that process
    settings.py    settings that the converter asks config.json for and that transformers has under another name
    convert.py     starts the process, and tells how far it is
    converted.py   its file: keys, tensors, and what the type rules look at
"""

EXTRA = "gguf"  # of pyproject.toml
PACKAGE = "auto_round"
