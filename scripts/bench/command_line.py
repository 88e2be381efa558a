"""What a user gets on a GPU: shipped recipes and rows of mixed length through `qlora-kit train`, on cards of a size.

Random checkpoints of published shapes are written to a folder first, as a hub would give them. A card of a smaller size
is made by holding the rest of its memory in another process. Every run is a child process with a recipe's own
settings; its line of the table has the memory that was planned and that was needed, tokens/s, or the error:

    python scripts/bench/command_line.py --tokenizer FOLDER --work /tmp/command_line
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = 1200
HOLD = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - float(sys.argv[1]) * 1e9), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("held", flush=True)
time.sleep(1e5)
"""
MIXED = ("data=rows", "data.max_tokens=2048", "trainer.batch_size=4", "trainer.max_steps=30")


@dataclass(frozen=True)
class Case:
    """One line that a user types.

    Attributes:
        free: GB that the card has; 0 for all of it.
    """

    name: str
    model: str
    words: tuple[str, ...]
    free: float = 0.0


def _shipped(experiment: str, model: str, free: float, *more: str) -> Case:
    name = "-".join((experiment, *(word.replace("=", "_") for word in more)))
    return Case(name, model, (f"experiment={experiment}", "model.revision=null", "trainer.max_steps=10", *more), free)


CASES = (
    _shipped("llama3_1_8b_chat_16gb", "llama_8b", 15.5),
    _shipped("llama3_1_8b_chat_16gb", "llama_8b", 15.5, "engine=fast"),
    _shipped("llama3_1_8b_chat_24gb", "llama_8b", 23.5),
    _shipped("llama3_1_8b_chat_24gb", "llama_8b", 23.5, "engine=fast"),
    _shipped("llama3_2_1b_chat_8gb", "llama_1b", 7.6),
    _shipped("llama3_2_1b_chat_8gb", "llama_1b", 7.6, "engine=fast"),
    _shipped("gemma3_4b_chat_12gb", "gemma_4b", 11.6),
    _shipped("qwen3_8b_chat_24gb", "qwen_8b", 23.5),
    _shipped("qwen3_8b_chat_24gb", "qwen_8b", 23.5, "engine=fast"),
    Case("mixed", "llama_8b", MIXED),
    Case("mixed-fast", "llama_8b", (*MIXED, "engine=fast")),
    Case("packed", "llama_8b", ("data=packed", *MIXED[1:])),
    Case("packed-fast", "llama_8b", ("data=packed", *MIXED[1:], "engine=fast")),
)


@dataclass
class Line:
    """What came of a case; sizes in bytes."""

    case: str
    words: list[str]
    free_gb: float
    exit_code: int
    seconds: float
    error: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, rows and runs")
    parser.add_argument("--results", type=Path, default=Path("scripts/bench/results"))
    parser.add_argument("--only", nargs="*", help="names of cases, or parts of names")
    parser.add_argument("--seconds", type=float, default=540, help="begin no further case after so many seconds")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one case")
    asked = parser.parse_args()
    began = time.monotonic()
    cases = [case for case in CASES if not asked.only or any(part in case.name for part in asked.only)]
    asked.work.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(case.model for case in cases):
        write_model(model, asked.tokenizer, asked.work / model)
    write_rows(asked.tokenizer, asked.work / "rows.jsonl")
    lines: list[Line] = []
    for case in cases:
        if time.monotonic() - began > asked.seconds:
            print(f"{case.name}: not begun, the time is up", flush=True)
            continue
        with card_of(case.free):
            lines.append(run(case, asked.work, asked.limit))
        print(shown(lines[-1]), flush=True)
        write(lines, asked.results)


def run(case: Case, work: Path, limit: float) -> Line:
    """One case in a child process."""
    folder = work / "runs" / case.name
    folder.mkdir(parents=True, exist_ok=True)
    words = ["train", *case.words, f"model.source={work / case.model}", f"data.train_file={work / 'rows.jsonl'}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "QLORA_KIT_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        try:
            command = [sys.executable, "-m", "qlora_kit", *words]
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=limit, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    line = Line(case.name, list(case.words), case.free, code, round(time.monotonic() - began, 1))
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    errors = [part for part in text.splitlines() if part.startswith("error") or "OutOfMemory" in part]
    line.error = errors[-1][:200] if errors else ""
    for result in folder.glob("outputs/*/*/result.json"):
        line.result = json.loads(result.read_text(encoding="utf-8"))
    return line


def shown(line: Line) -> str:
    """A line of the table."""
    planned, peak = (line.result.get(name, 0.0) / 1e9 for name in ("planned_memory_bytes", "peak_memory_bytes"))
    off = f"{planned / peak - 1:+.0%}" if planned and peak else ""
    rate = line.result.get("tokens_per_second", 0.0)
    return (
        f"{line.case:42} free {line.free_gb or 'all':>5} exit {line.exit_code} {line.seconds:5.0f} s  "
        f"planned {planned:5.1f} needed {peak:5.1f} GB {off:5} {rate:7.0f} tokens/s {line.error}"
    )


def write(lines: list[Line], results: Path) -> None:
    """Keep what was measured, with the device and the versions."""
    import torch

    from qlora_kit.core.environment import capture_environment

    device = torch.cuda.get_device_name().lower().replace(" ", "_")
    place = results / device / f"command_line-{time.strftime('%Y-%m-%d')}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": capture_environment(), "lines": [asdict(line) for line in lines]}
    place.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextmanager
def card_of(gigabytes: float) -> Iterator[None]:
    """Leave only so many GB (10^9 bytes) of the GPU free, for as long as this lasts; 0 for all."""
    if not gigabytes:
        yield
        return
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(gigabytes)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        yield
    finally:
        holder.kill()
        holder.wait()


def configs() -> dict[str, Any]:
    """Published shapes by name."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    of_llama = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_attention_heads": 32}
    return {
        "llama_8b": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, **of_llama
        ),
        "llama_1b": LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
            **of_llama,
        ),
        "qwen_8b": Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
        ),
        "gemma_4b": Gemma3TextConfig(
            vocab_size=262208,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            sliding_window=1024,
            tie_word_embeddings=True,
        ),
    }


def write_model(name: str, tokenizer: Path, place: Path) -> None:
    """A random checkpoint in bf16 with the tokenizer, unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (place / "tokenizer_config.json").exists():
        return
    words, config = AutoTokenizer.from_pretrained(tokenizer), configs()[name]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        words.bos_token_id,
        words.eos_token_id,
        words.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place, max_shard_size="5GB")
    words.save_pretrained(place)
    del model
    torch.cuda.empty_cache()


def write_rows(tokenizer: Path, place: Path) -> None:
    """Chat rows of mixed length, 870 tokens on average with SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    draw = random.Random(0)
    words = [word for word in AutoTokenizer.from_pretrained(tokenizer).get_vocab() if word.isalpha()][:4000]

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(shortest, longest)))

    with place.open("w", encoding="utf-8") as stream:
        for _ in range(ROWS):
            turns = [
                {"role": "user", "content": text(20, 120)},
                {"role": "assistant", "content": text(60, 300)},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()
