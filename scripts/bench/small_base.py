"""Trains a small base from nothing, with widths that are multiples of 256, so that block formats can be told apart.

    python scripts/bench/small_base.py --out /tmp/small_base

The text is what comes with Python, its documentation topics and sources, and the sentences and JSON lines of
`home_commands`, never side by side: the base learns both languages, and the pairs are left to the fine-tune.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY, WINDOW, ROWS = 2048, 128, 8
SOURCES = 60  # files of Python's library


def texts(commands: Path) -> list[str]:
    """Documents to learn from."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [str(topic) for topic in pydoc_data.topics.topics.values()]
    found += [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:SOURCES]]
    asked: list[str] = []
    answered: list[str] = []
    for line in commands.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            {"user": asked, "assistant": answered}.get(message["role"], []).append(message["content"])
    answered.sort()  # in another order than the questions
    return found + ["\n".join(asked[at : at + 40]) for at in range(0, len(asked), 40)] + [
        "\n".join(answered[at : at + 40]) for at in range(0, len(answered), 40)
    ]  # fmt: skip


def written_commands(folder: Path) -> Path:
    """The rows of `home_commands` that are trained on."""
    subprocess.run([sys.executable, "-m", "qlora_kit.data.home_commands", "--out", str(folder)], check=True)
    return folder / "train.jsonl"


def tokenizer_of(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens and template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0], unk_token=SPECIAL[0]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def model_of(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of four million weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> float:
    """Train on windows drawn at random; returns the mean of the last losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    draw = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        starts = torch.randint(len(ids) - WINDOW, (ROWS,), generator=draw)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()]).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.item()))
        if len(losses) % 50 == 0:
            left = (time.perf_counter() - began) / len(losses) * (steps - len(losses))
            print(f"step {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}, {left:.0f} s left", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commands", type=Path, help="train.jsonl of home_commands; written anew unless given")
    parser.add_argument("--steps", type=int, default=1500)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        documents = texts(chosen.commands or written_commands(Path(folder)))
    tokenizer = tokenizer_of(documents)
    ids = torch.tensor([token for document in documents for token in [*tokenizer.encode(document), 0]])
    model = model_of(tokenizer)
    print(f"{sum(part.numel() for part in model.parameters()):,} weights, {len(ids):,} tokens of text")
    last = train(model, ids, chosen.steps)
    model.to(torch.bfloat16).save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    print(f"loss {last:.3f}; saved in {chosen.out}")


if __name__ == "__main__":
    main()
