"""Trains a random Llama of 1B shape in NF4 with double quantization and paged_adamw_8bit, through `qlora-kit train`.

Makes the base and the rows itself, so it needs no hub. The same rows come back in every batch, so the loss must fall.
Prints a table and writes results/<device>/nf4_1b.json: `python scripts/bench/nf4_1b.py --work /tmp/bench`.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_kit.core.environment import capture_environment
from qlora_kit.core.files import read_json, write_json
from qlora_kit.tracking.tracker import read_metrics

RESULTS = Path(__file__).parent / "results"
LLAMA_3_2_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(folder: Path, config: LlamaConfig) -> None:
    """Write random bf16 weights of a shape, with a byte-level tokenizer trained on a few lines."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["turn on the light in the kitchen"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    model.generation_config.eos_token_id = fast.eos_token_id
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def make_rows(path: Path, rows: int, characters: int) -> None:
    """Write rows of random words; every step sees all of them."""
    words = random.Random(0)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            text = "".join(words.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(characters))
            messages = [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:]}]
            stream.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Make the base, train, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the base, the rows and the run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--characters", type=int, default=1900)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to try the script on a CPU")
    chosen = parser.parse_args()
    work: Path = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    config = LLAMA_3_2_1B
    if chosen.tiny:
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=1024)
    make_base(work / "base", config)
    make_rows(work / "rows.jsonl", chosen.rows, chosen.characters)
    overrides = [
        "model=demo",
        f"model.source={work / 'base'}",
        "quant=nf4_double",
        "lora=all_linear",
        "data=messages",
        f"data.train_file={work / 'rows.jsonl'}",
        "data.max_tokens=4096",
        "optim=paged_adamw_8bit",
        f"optim.fallback={'false' if torch.cuda.is_available() else 'true'}",
        "optim.learning_rate=1e-3",
        f"trainer.batch_size={chosen.rows}",
        f"trainer.max_steps={chosen.steps}",
        "trainer.gradient_checkpointing=false",
        "name=nf4_1b",
    ]
    subprocess.run([sys.executable, "-m", "qlora_kit", "train", *overrides], cwd=work, check=True)
    report(max(work.glob("outputs/nf4_1b/*/result.json"), key=lambda path: path.stat().st_mtime), overrides)


def report(result: Path, overrides: list[str]) -> None:
    """Print losses, speed and memory; store them under the device's name."""
    steps = [row for row in read_metrics(result.parent / "metrics.jsonl") if "loss" in row]
    environment = {key: value for key, value in capture_environment().items() if key != "platform"}
    gpus = environment["gpus"]
    device = str(gpus[0]) if isinstance(gpus, list) and gpus else "cpu"
    print(f"{device}, torch {torch.__version__}")
    print("step    loss  grad norm  tokens/s   peak GB")
    for row in steps:
        print(
            f"{row['step']:4.0f} {row['loss']:7.4f} {row['grad_norm']:10.3f} {row['tokens_per_second']:9.0f} "
            f"{row['peak_memory_bytes'] / 1e9:9.2f}"
        )
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "_", device.lower())
    shown = [override for override in overrides if "source" not in override and "file" not in override]
    record = {"environment": environment, "overrides": shown, "result": read_json(result), "steps": steps}
    write_json(folder / "nf4_1b.json", record)
    if steps[-1]["loss"] >= 0.7 * steps[0]["loss"]:
        raise SystemExit(f"the loss did not fall: {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()
