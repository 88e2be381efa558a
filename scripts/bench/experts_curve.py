"""Does a mixture learn with the kit as with plain peft? The losses of one training, step by step, and held out.

A small random Qwen3-MoE learns 64 rows of commands, all of them in every step, so that their order does not matter.
With the kit through the command line: experts in 16 bit, in NF4, and in NF4 with the fast engine. With peft by its own
`target_parameters` on transformers' model, in bf16 autocast:

    python scripts/bench/experts_curve.py --tokenizer FOLDER --work /tmp/experts_curve --steps 60
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_base import Shape, write_base

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS, MICRO = 64, 16
RATE, RANK, ALPHA = 2e-3, 16, 32
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WAYS = {
    "kit, 16 bit": ("quant=none",),
    "kit, nf4": ("quant=nf4_double",),
    "kit, nf4, fast": ("quant=nf4_double", "engine=fast"),
}


def main() -> None:
    """Train all ways, print the curves side by side and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("scripts/bench/results"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=8)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    write_base(Shape(_config, asked.layers), asked.tokenizer, asked.work / "base")
    _write_rows(asked.work)
    curves = {name: _with_kit(asked.work, name.replace(", ", "_"), asked.steps, words) for name, words in WAYS.items()}
    curves["peft, 16 bit"] = _with_peft(asked.work, asked.steps)
    for step in range(0, asked.steps, max(1, asked.steps // 12)):
        print(f"{step + 1:4} " + " ".join(f"{name} {curve['losses'][step]:.4f}" for name, curve in curves.items()))
    print("held out " + " ".join(f"{name} {curve['held_out']:.4f}" for name, curve in curves.items()))
    _keep(asked.results, curves)


def _config(layers: int) -> Any:
    from transformers import Qwen3MoeConfig

    widths = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "head_dim": 64}
    counts = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 4}
    return Qwen3MoeConfig(vocab_size=50000, num_hidden_layers=layers, norm_topk_prob=True, **widths, **counts)


def _write_rows(work: Path) -> None:
    rooms = ("kitchen", "hall", "cellar", "attic", "garden", "study", "bath", "porch")
    things = ("lamp", "fan", "radio", "heater", "door", "blind", "pump", "camera", "screen", "bell", "lock", "oven")
    rows = [(f"Switch the {thing} in the {room} on.", f"on({thing}, {room})") for room in rooms for thing in things]
    held_out = rows[2::3]
    for name, some in (("train", [row for row in rows if row not in held_out]), ("held_out", held_out)):
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for asked, answer in some:
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"messages": turns}) + "\n")


def _with_kit(work: Path, name: str, steps: int, words: tuple[str, ...]) -> dict[str, Any]:
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    line = [
        *(f"model.source={work / 'base'}", "data=rows", f"data.train_file={work / 'train.jsonl'}"),
        *(f"data.eval_file={work / 'held_out.jsonl'}", "data.max_tokens=128"),
        *(f"trainer.batch_size={MICRO}", f"trainer.gradient_accumulation={ROWS // MICRO}"),
        *(f"trainer.max_steps={steps}", "trainer.log_every_steps=1", "optim=adamw", f"optim.learning_rate={RATE}"),
        *("optim.schedule=constant", "optim.warmup_fraction=0", f"lora.r={RANK}", f"lora.alpha={ALPHA}", *words),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with (folder / "log.txt").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_kit", "train", *line],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        raise SystemExit((folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:])
    (run,) = folder.glob("outputs/*/*")
    logged = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {"losses": [one["loss"] for one in logged if "loss" in one], "held_out": result["eval_loss"]}


def _with_peft(work: Path, steps: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_kit.model.device import this_device

    device = this_device()
    words = AutoTokenizer.from_pretrained(work / "base")
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16).to(device)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION, target_parameters=STACKS)
    model = get_peft_model(base, settings).train()
    trained = [part for part in model.parameters() if part.requires_grad]
    for part in trained:
        part.data = part.data.float()
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    batches = {name: _batches(words, work / f"{name}.jsonl", device) for name in ("train", "held_out")}
    losses = [_loss(model, batches["train"], optimizer, trained) for _ in range(steps)]
    with torch.no_grad():
        held_out = _loss(model.eval(), batches["held_out"])
    return {"losses": losses, "held_out": held_out}


def _batches(words: Any, file: Path, device: Any) -> list[dict[str, Any]]:
    """Micro-batches of token ids and labels, of the answers alone."""
    import torch

    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [
        (
            words.apply_chat_template(row[:1], tokenize=False, add_generation_prompt=True),
            words.apply_chat_template(row, tokenize=False).rstrip("\n"),  # up to the mark of its end
        )
        for row in rows
    ]
    made = []
    for place in range(0, len(texts), MICRO):
        part = texts[place : place + MICRO]
        ids = [words(whole, add_special_tokens=False)["input_ids"] for _, whole in part]
        asked = [len(words(first, add_special_tokens=False)["input_ids"]) for first, _ in part]
        width = max(map(len, ids))
        inputs, labels = torch.zeros(len(ids), width, dtype=torch.long), torch.full((len(ids), width), -100)
        mask = torch.zeros_like(inputs)
        for row, (tokens, begin) in enumerate(zip(ids, asked, strict=True)):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, begin : len(tokens)] = inputs[row, begin : len(tokens)]
            mask[row, : len(tokens)] = 1
        batch = {"input_ids": inputs, "labels": labels, "attention_mask": mask}
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


def _loss(model: Any, batches: list[dict[str, Any]], optimizer: Any = None, trained: Any = ()) -> float:
    """The mean over all trained tokens; with an optimizer a step is made."""
    import torch

    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            loss = model(**batch, num_items_in_batch=torch.tensor(tokens), use_cache=False).loss
        total += float(loss.detach())
        if optimizer is not None:
            loss.backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return total


def _keep(results: Path, curves: dict[str, Any]) -> None:
    import torch
    from prepare import device_name, folder_of

    from qlora_kit.core.environment import capture_environment

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device_name()
    place = results / folder_of(device) / f"experts_curve-{time.strftime('%Y-%m-%d')}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": capture_environment(), "curves": curves}
    place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
