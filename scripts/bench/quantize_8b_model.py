"""The checkpoints and calibration rows of quantize_8b.py: a random Llama of which any number of layers is used."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge import SHAPES as MERGED_SHAPES
from merge import Shape

from qlora_kit.core.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = {**MERGED_SHAPES, "tiny": Shape(256, 512, 4, 4, 2, 64, tied=False, vocabulary=640)}
POOL = "pool"
ROWS = "rows.npy"
SCORED_ROWS, SCORED_TOKENS = 4, 256


def make_pool(work: Path, shape: Shape, layers: int, count: int, seq_len: int) -> None:
    """Random bf16 weights, a file a layer, and rows of token ids [count, seq_len] that are more often small."""
    import numpy as np

    pool = work / POOL
    pool.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in replace(shape, layers=layers).tensors():
        parts.setdefault(_file_of(name), {})[name] = size
    for seed, (file, tensors) in enumerate(parts.items()):
        _write_random(pool / file, tensors, seed)
    drawn = np.random.default_rng(0).random((count + SCORED_ROWS, seq_len))
    np.save(work / ROWS, (drawn**3 * shape.vocabulary).astype(np.int32))


def _file_of(name: str) -> str:
    parts = name.split(".")
    return f"layer_{int(parts[2]):05d}" if parts[1] == "layers" else "outside"


def _write_random(path: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, size in tensors.items():
        values = torch.randn(size, generator=generator, device=device)
        # Gains that differ, so that some channels matter more than others.
        values = 0.3 + values.abs() if len(size) == 1 else values * 0.02
        made[name] = values.bfloat16().cpu()
    save_file(made, path, metadata={"format": "pt"})


def model_folder(work: Path, shape: Shape, layers: int) -> Path:
    """A checkpoint of the first layers, whose weights are links into the pool."""
    folder = work / f"base_{layers}"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir()
    used = replace(shape, layers=layers)
    files = ["outside", *(f"layer_{layer:05d}" for layer in range(layers))]
    name_of = {file: f"model-{place:05d}-of-{len(files):05d}.safetensors" for place, file in enumerate(files, 1)}
    for file, name in name_of.items():
        os.link(work / POOL / file, folder / name)
    where = {name: name_of[_file_of(name)] for name, _ in used.tensors()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    _write_tokenizer(folder)
    write_json(folder / "config.json", used.config())
    return folder


def _write_tokenizer(folder: Path) -> None:
    """The libraries load one beside the model; the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<pad>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def calibration_rows(work: Path, count: int) -> list[list[int]]:
    """The first rows; the last ones are for the comparison."""
    import numpy as np

    rows: list[list[int]] = np.load(work / ROWS)[:count].tolist()
    return rows


def scored_rows(work: Path) -> "Tensor":
    """Token ids [rows, tokens] that no calibration saw."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(work / ROWS)[-SCORED_ROWS:, :SCORED_TOKENS].astype("int64"))


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(names):
        yield from load_file(folder / name).items()
