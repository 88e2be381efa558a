"""Times the GGUF files of a random sharded checkpoint against `cp` of it, and Q4_K_M against llama.cpp's own quantizer.

Makes a checkpoint of a Llama shape in bf16 with a vocabulary of full size. `cp`, the conversions and the quantizers
take turns, after a `sync`, each from a process of its own; `--layers` cuts the shape where the disk is small. Read is
from the page cache where it fits in there. `seconds` are those of the call, with all modules loaded as an export has
them; `synced` goes on until the disk has it all; `weights_per_second` is the work of a quantizer. Give llama.cpp's
`llama-quantize` with `--peer`: it makes Q4_K_M of the BF16 file with as many threads as the kit takes, and
`same_blocks` says that both files hold the same bytes. Writes results/<device>/gguf-<date>.json, for other shapes
gguf_1b-<date>.json or gguf_8b_8_layers-<date>.json; its rows hold medians and minima, since other work on the machine
only ever adds to a time:

    python scripts/bench/gguf_speed.py --shape 1b --peer llama.cpp/build/bin/llama-quantize
    python scripts/bench/gguf_speed.py --shape 8b --place /scratch    # 33 GB there, 49 GB with --peer
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from math import prod
from pathlib import Path

from merge import SHAPES, Shape, device_name, write_base

from qlora_kit.core.environment import capture_environment
from qlora_kit.core.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
MIXES = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
PEER = "llama_quantize"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = 256  # tokens of the vocabulary that no text holds


def write_checkpoint(folder: Path, shape: Shape) -> None:
    """A checkpoint that can be converted: weights, settings and tokenizer."""
    write_base(folder, shape)
    more = {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "hidden_act": "silu",
        "bos_token_id": shape.vocabulary - SPECIAL,
        "eos_token_id": shape.vocabulary - SPECIAL + 1,
    }
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **more})
    write_tokenizer(folder, shape.vocabulary)


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of so many tokens, split as Llama 3's, whose merges are of no language."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in letters for right in letters]
    pairs += [(left + left, right + other) for left in letters for right in letters for other in letters[:2]]
    merges = pairs[: size - SPECIAL - len(letters)]
    vocabulary = {token: number for number, token in enumerate([*letters, *(left + right for left, right in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([f"<|special_{number}|>" for number in range(SPECIAL)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|special_0|>", eos_token="<|special_1|>", pad_token="<|special_2|>"
    )
    wrapped.save_pretrained(folder)


def child(work: Path, what: str, peer: Path | None) -> None:
    """One copy or file, with all modules loaded as an export has them; prints its result as JSON on the last line."""
    import gguf
    import libgguf  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    from qlora_kit.formats.gguf.writer import write_gguf

    out, file = work / "out", work / "out" / "model.gguf"
    assert gguf.GGUFWriter
    began = time.perf_counter()
    if what == "cp":
        subprocess.run(["cp", "-r", str(work / "base"), str(out)], check=True)
    elif what == PEER:
        out.mkdir()
        line = [str(peer), str(work / "bf16.gguf"), str(file), "Q4_K_M", str(len(os.sched_getaffinity(0)))]
        subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    else:
        out.mkdir()
        write_gguf(work / "base", file, MIXES[what], name="model")
    found = {"seconds": time.perf_counter() - began}
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found["peak_gb"] = max(used.ru_maxrss for used in usage) * 1024 / 1e9
    os.sync()
    found["synced"] = time.perf_counter() - began
    print(json.dumps(found))


def measure(work: Path, what: str, peer: Path | None, keep: Path | None = None) -> dict[str, float]:
    """One copy or file, on a disk that is at rest, in a process of its own."""
    os.sync()
    line = [sys.executable, __file__, "--child", what, "--place", str(work), *(["--peer", str(peer)] if peer else [])]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if keep:
        (work / "out" / "model.gguf").replace(keep)
    shutil.rmtree(work / "out")
    print(what, json.dumps({name: round(value, 2) for name, value in found.items()}), flush=True)
    return found


def same_blocks(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, of the same types and to the byte."""
    import gguf
    import numpy as np

    left, right = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (one, other))
    return left.keys() == right.keys() and all(
        left[name].tensor_type == right[name].tensor_type and np.array_equal(left[name].data, right[name].data)
        for name in left
    )


def summary(rows: list[dict[str, float]], copied: list[dict[str, float]], weights: int) -> dict[str, float]:
    """Medians and minima of the repeats, and their ratios to `cp`."""
    found: dict[str, float] = {}
    for name in ("seconds", "synced"):
        for word, of in (("", statistics.median), ("_min", min)):
            value, reference = of(row[name] for row in rows), of(row[name] for row in copied)
            found |= {f"{name}{word}": round(value, 2), f"{name}{word}_to_cp": round(value / reference, 2)}
    found["weights_per_second"] = round(weights / found["seconds_min"])
    found["peak_gb"] = round(max(row["peak_gb"] for row in rows), 2)
    return found


def run_all(
    work: Path, shape: Shape, chosen: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], bool | None, int]:
    """Make the files and measure in turns; also whether the peer's blocks are ours, and the checkpoint's bytes."""
    (work / "base").mkdir()
    write_checkpoint(work / "base", shape)
    size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    peer: Path | None = chosen.peer
    same = None
    if peer:
        measure(work, "bf16", None, keep=work / "bf16.gguf")
        measure(work, "q4_k_m", None, keep=work / "ours.gguf")
        measure(work, PEER, peer, keep=work / "theirs.gguf")
        with ProcessPoolExecutor(1) as apart:  # what a process held counts as held by those that it starts
            same = apart.submit(same_blocks, work / "ours.gguf", work / "theirs.gguf").result()
        (work / "ours.gguf").unlink()
        (work / "theirs.gguf").unlink()
    runs: dict[str, list[dict[str, float]]] = {what: [] for what in ("cp", *chosen.mixes, *([PEER] if peer else []))}
    for _ in range(chosen.repeats):
        for what, found in runs.items():
            found.append(measure(work, what, peer))
    return runs, same, size


def main() -> None:
    """Make the files, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="decoder layers, where the disk does not hold all")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=["bf16", "f16", "q4_k_m"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--place", type=Path, help="a folder with room for the checkpoint twice, thrice with --peer")
    parser.add_argument("--peer", type=Path, help="llama.cpp's llama-quantize")
    parser.add_argument("--child", choices=("cp", *MIXES, PEER))
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.place, chosen.child, chosen.peer)
        return
    whole = SHAPES[chosen.shape]
    shape = replace(whole, layers=chosen.layers or whole.layers)
    weights = sum(prod(size) for _, size in shape.tensors())
    with tempfile.TemporaryDirectory(dir=chosen.place) as folder:
        runs, same, size = run_all(Path(folder), shape, chosen)
    table = [{"what": what, **summary(found, runs["cp"], weights)} for what, found in runs.items()]
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"the same blocks as llama.cpp: {same}")
    name = device_name()
    label = chosen.shape if shape == whole else f"{chosen.shape}_{shape.layers}_layers"
    file = "gguf" if label == "8b" else f"gguf_{label}"
    place = RESULTS / re.sub(r"\W+", "_", name.lower()).strip("_") / f"{file}-{date.today().isoformat()}.json"
    versions = {key: value for key, value in capture_environment().items() if key != "platform"}
    result = {"shape": chosen.shape, "layers": shape.layers, "base_gb": round(size / 1e9, 2), "weights": weights}
    write_json(
        place, {"device": name, "versions": versions, **result, "same_blocks": same, "rows": table, "runs": runs}
    )
    print(place)


if __name__ == "__main__":
    main()
