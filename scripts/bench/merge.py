"""Times the streamed merge of a rank-16 adapter against `cp` of the same checkpoint, and takes its peak memory.

Makes a random sharded checkpoint of a Llama shape and a random adapter on all linear layers, written a block at a time.
`cp` and each merge take turns, after a `sync`, each from a process of its own that has loaded the same modules: so both
find the machine's memory in the same state, which on a virtual machine counts for more than the sums. The checkpoint
is read from the page cache where it fits in there. `seconds` are those of the call; `synced` goes on until the disk has
it all; `peak_gb` is the process's resident memory. Writes results/<device>/merge-<date>.json, or merge_1b-<date>.json;
its rows hold medians:

    python scripts/bench/merge.py --shape 1b
    python scripts/bench/merge.py --shape 8b --bases original dequantized --place /scratch    # 34 GB there
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from math import prod
from pathlib import Path

from qlora_kit.core.environment import capture_environment
from qlora_kit.core.files import write_json

RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = 5_000_000_000
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    tied: bool
    vocabulary: int = 128_256

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Weights [outputs, inputs] of a layer's linear modules."""
        keys, queries = self.key_heads * self.head, self.heads * self.head
        return {
            f"model.layers.{layer}.self_attn.q_proj": (queries, self.hidden),
            f"model.layers.{layer}.self_attn.k_proj": (keys, self.hidden),
            f"model.layers.{layer}.self_attn.v_proj": (keys, self.hidden),
            f"model.layers.{layer}.self_attn.o_proj": (self.hidden, queries),
            f"model.layers.{layer}.mlp.gate_proj": (self.inner, self.hidden),
            f"model.layers.{layer}.mlp.up_proj": (self.inner, self.hidden),
            f"model.layers.{layer}.mlp.down_proj": (self.hidden, self.inner),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            yield from ((f"{name}.weight", shape) for name, shape in self.linears(layer).items())
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """config.json of it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64, tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, tied=False),
}


def write_base(folder: Path, shape: Shape) -> None:
    """A checkpoint of random bf16 weights."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shape.tensors():
        if sum(map(prod, shards[-1].values())) * 2 + prod(size) * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
    for file, tensors in zip(names, shards, strict=True):
        _write_shard(folder / file, tensors)
    where = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    write_json(folder / "config.json", shape.config())


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    import torch

    block = memoryview((torch.randn(1 << 23) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes())
    table, begin = {}, 0
    for name, size in tensors.items():
        end = begin + prod(size) * 2
        table[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while begin:
            begin -= stream.write(block[:begin])


def write_adapter(folder: Path, shape: Shape) -> None:
    """A random adapter on all linear layers, in fp32."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(shape.layers):
        for name, (outputs, inputs) in shape.linears(layer).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK})


class NoTokenizer:
    """Stands for a tokenizer: the weights are what is timed."""

    def __len__(self) -> int:
        return 0

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing."""


def child(work: Path, what: str) -> None:
    """One copy or merge, with all modules loaded as an export has them; prints its result as JSON on the last line."""
    import bitsandbytes  # noqa: F401
    import torch
    import transformers.quantizers.base  # noqa: F401
    from transformers.models.llama import LlamaForCausalLM  # noqa: F401

    from qlora_kit.export.merge import merge
    from qlora_kit.schema.export import MergeBase
    from qlora_kit.schema.quant import QuantConfig

    out = work / "out"
    found: dict[str, float] = {}
    began = time.perf_counter()
    if what == "cp":
        subprocess.run(["cp", "-r", str(work / "base"), str(out)], check=True)
    else:
        out.mkdir()
        report = merge(work / "base", work / "adapter", QuantConfig(), MergeBase[what], NoTokenizer(), out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"peak_gb": peak / 1e9, "merged": report.merged, "changed": report.changed}
        if torch.cuda.is_available():
            found["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    found["seconds"] = time.perf_counter() - began
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found["cpu_of_process"] = sum(used.ru_utime + used.ru_stime for used in usage)
    os.sync()
    found["synced"] = time.perf_counter() - began
    print(json.dumps(found))


def measure(work: Path, what: str) -> dict[str, float]:
    """One copy or merge, on a disk that is at rest, in a process of its own."""
    os.sync()
    line = [sys.executable, __file__, "--child", what, "--place", str(work)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(work / "out")
    print(what, json.dumps({name: round(value, 2) for name, value in found.items()}), flush=True)
    return found


def device_name() -> str:
    """The GPU, or the processor's model, and how many CPUs this process may use."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model} x{len(os.sched_getaffinity(0))}"


def summary(rows: list[dict[str, float]], copied: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the repeats, and the ratios to `cp`."""
    names = [name for name in rows[0] if name not in ("merged", "changed")]
    found = {name: round(statistics.median(row[name] for row in rows), 2) for name in names}
    for name in ("seconds", "synced"):
        found[f"{name}_to_cp"] = round(found[name] / statistics.median(row[name] for row in copied), 2)
    return found


def main() -> None:
    """Make the files, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--bases", nargs="+", choices=("original", "dequantized"), default=["original"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--place", type=Path, help="a folder with room for the checkpoint twice")
    parser.add_argument("--child", choices=("cp", "original", "dequantized"))
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.place, chosen.child)
        return
    shape = SHAPES[chosen.shape]
    runs: dict[str, list[dict[str, float]]] = {what: [] for what in ("cp", *chosen.bases)}
    with tempfile.TemporaryDirectory(dir=chosen.place) as folder:
        work = Path(folder)
        (work / "base").mkdir()
        write_base(work / "base", shape)
        write_adapter(work / "adapter", shape)
        size = sum(path.stat().st_size for path in (work / "base").iterdir())
        for _ in range(chosen.repeats):
            for what, found in runs.items():
                found.append(measure(work, what))
    table = [{"what": what, **summary(found, runs["cp"])} for what, found in runs.items()]
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    name = device_name()
    file = "merge" if chosen.shape == "8b" else f"merge_{chosen.shape}"
    place = RESULTS / re.sub(r"\W+", "_", name.lower()).strip("_") / f"{file}-{date.today().isoformat()}.json"
    versions = {key: value for key, value in capture_environment().items() if key != "platform"}
    result = {"shape": chosen.shape, "base_gb": round(size / 1e9, 2), "rank": RANK, "rows": table, "runs": runs}
    write_json(place, {"device": name, "versions": versions, **result})
    print(place)


if __name__ == "__main__":
    main()
