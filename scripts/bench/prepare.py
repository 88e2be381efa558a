"""Prepares the same Alpaca-like rows with qlora_kit and with TRL: read, render, tokenize, mask, pack.

Each run is a process of its own, with an empty cache, and its memory is that of the process and its children, sampled.
qlora_kit reads the file within its time; TRL gets the rows loaded. Both use as many processes as there are CPUs, mask
everything but the answer and pack into bins of 2,048 tokens. Writes results/<device>/prepare-<date>.json:

    python scripts/bench/prepare.py --tokenizer FOLDER --rows 50000 1000000 --trl-rows 50000
"""

import argparse
import json
import os
import platform
import pydoc_data.topics
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

from qlora_kit.core.environment import capture_environment
from qlora_kit.core.files import write_json

RESULTS = Path(__file__).parent / "results"
CAPACITY = 2048
SENTENCES = [
    " ".join(sentence.split())
    for topic in pydoc_data.topics.topics.values()
    for sentence in re.split(r"(?<=[.:])\s+", topic)
    if 4 <= len(sentence.split()) <= 40
]


def write_rows(path: Path, count: int) -> None:
    """`count` rows with the lengths of the Alpaca set: short questions, answers of a few to a few hundred words."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"{number}. {draw.choice(SENTENCES)}"
            answer = draw.choices(SENTENCES, k=max(1, min(20, round(draw.lognormvariate(1.0, 0.8)))))
            turns = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": " ".join(answer)}],
            }
            file.write(json.dumps(turns) + "\n")


class PeakMemory(threading.Thread):
    """Samples the proportional memory of this process and its children, ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stop = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    info = process.memory_full_info()
                    total += info.pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak = max(self.peak, total)


def ours(rows: Path, tokenizer_folder: Path, count: int) -> dict[str, float]:
    """Prepare with qlora_kit."""
    from qlora_kit.data.packing import pack
    from qlora_kit.data.prepare import prepare
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.schema.data import DataConfig, Overflow

    tokenizer = load_tokenizer(tokenizer_folder)
    config = DataConfig(train_file=str(rows), max_tokens=CAPACITY, overflow=Overflow.drop)
    config.columns, config.roles, config.sources = {}, {}, {}
    began = time.perf_counter()
    data = prepare(config, tokenizer)
    packing = pack(data.train.lengths, CAPACITY)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "kept_rows": len(data.train),
        "tokens": data.summary.train.tokens,
        "trained_tokens": data.summary.train.trained_tokens,
        "bins": len(packing),
        "packing_efficiency": packing.efficiency,
    }


def trl(rows: Path, tokenizer_folder: Path, count: int) -> dict[str, float]:
    """Prepare with TRL's own preparation."""
    import torch
    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    dataset = load_dataset("json", data_files=str(rows), split="train")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(torch.float32)
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "max_length": CAPACITY,
        "packing": True,
        "report_to": [],
        "bf16": False,
        "dataset_num_proc": len(os.sched_getaffinity(0)),
    }
    one = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    quiet = SFTConfig(**{**settings, "packing": False}, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(model=model, args=quiet, train_dataset=one, processing_class=tokenizer)
    args = SFTConfig(**settings)
    trainer.completion_only_loss = True
    began = time.perf_counter()
    packed = trainer._prepare_dataset(dataset, tokenizer, args, True, None, "train")
    seconds = time.perf_counter() - began
    sample = packed[:200]
    tokens = sum(len(ids) for ids in sample["input_ids"])
    return {
        "seconds": seconds,
        "bins": len(packed),
        "packing_efficiency": tokens / (CAPACITY * len(sample["input_ids"])),
    }


def child(stack: str, rows: Path, tokenizer: Path, count: int) -> None:
    """One run; prints its result as JSON on the last line."""
    memory = PeakMemory()
    memory.start()
    result = (ours if stack == "qlora_kit" else trl)(rows, tokenizer, count)
    memory.stop.set()
    row = {"stack": stack, "rows": count, "rows_per_s": round(count / result["seconds"], 1)}
    print(json.dumps(row | {"peak_mb": round(memory.peak / 1e6, 1)} | result))


def measure(stack: str, rows: Path, tokenizer: Path, count: int) -> dict[str, float]:
    """Run one stack in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "QLORA_KIT_CACHE": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        line = [sys.executable, __file__, "--child", stack, "--file", str(rows), "--tokenizer", str(tokenizer)]
        done = subprocess.run(
            [*line, "--rows", str(count)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def device_name() -> str:
    """The processor's model and how many CPUs this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model} x{len(os.sched_getaffinity(0))}"


def folder_of(device: str) -> str:
    """A processor as a folder's name."""
    return "_".join(word for word in device.lower().replace("(r)", "").replace("(tm)", "").split() if word.isalnum())


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000])
    parser.add_argument("--trl-rows", type=int, nargs="*", default=[50_000])
    parser.add_argument("--child", choices=("qlora_kit", "trl"))
    parser.add_argument("--file", type=Path)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.file, chosen.tokenizer, chosen.rows[0])
        return
    results = []
    with tempfile.TemporaryDirectory() as work:
        for count in sorted({*chosen.rows, *chosen.trl_rows}):
            rows = Path(work) / f"{count}.jsonl"
            write_rows(rows, count)
            for stack, wanted in (("qlora_kit", chosen.rows), ("trl", chosen.trl_rows)):
                if count in wanted:
                    results.append(measure(stack, rows, chosen.tokenizer, count))
            rows.unlink()
    name = device_name()
    place = RESULTS / re.sub(r"\W+", "_", name.lower()).strip("_") / f"prepare-{date.today().isoformat()}.json"
    versions = {key: value for key, value in capture_environment().items() if key != "platform"}
    write_json(place, {"device": name, "versions": versions, "rows": results})
    print(place)


if __name__ == "__main__":
    main()
