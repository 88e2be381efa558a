"""Fine-tunes a real model on real text with each engine and number format, and compares what comes out.

The same rows in the same order, from the same first weights, over two seeds; the held-out loss is always computed in
16 bit by the plain path, as the trained adapter will be served. Prints a table, writes
results/<device>/parity-<date>.json, and draws the curves:

    python scripts/bench/parity.py --base FOLDER --text /usr/lib/python3.12 --picture docs/parity.svg
"""

import argparse
import json
import math
import re
import tempfile
import time
import zlib
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity_picture import picture
from train_step.rows import stored
from transformers import TrainerCallback

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.core.environment import capture_environment
from qlora_kit.data.tokens import TokenRows
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig, Schedule
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.run import build_trainer, held_out_loss, run_training

RESULTS = Path(__file__).parent / "results"
ENGINES = {
    "plain bf16": EngineConfig(mode=EngineMode.plain),
    "fast bf16": EngineConfig(mode=EngineMode.fast),
    "fast fp8_backward": EngineConfig(mode=EngineMode.fast, compute=Compute.fp8_backward),
    "fast fp8": EngineConfig(mode=EngineMode.fast, compute=Compute.fp8),
}
REFERENCE = "fast bf16"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="a model folder")
    parser.add_argument("--text", type=Path, required=True, help="a folder of text; every 20th file is held out")
    parser.add_argument("--files", default="*.py", help="those of its files, at any depth")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="in a step")
    parser.add_argument("--tokens", type=int, default=1024, help="in a row")
    parser.add_argument("--held-out", type=int, default=64, help="rows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def rows_of(files: list[Path], tokenizer: Any, tokens: int, count: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """The first rows of so many tokens that the files give, one after another."""
    found: list[int] = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(found) >= tokens * count:
            return list(np.array(found[: tokens * count], dtype=np.int64).reshape(count, tokens))
    raise SystemExit(f"the text has {len(found):,} tokens, and {tokens * count:,} are needed")


class Losses(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        """Note it."""
        if logs and "loss" in logs:
            self.found.append(round(float(logs["loss"]), 5))


def recipe_of(chosen: argparse.Namespace, engine: EngineConfig, seed: int) -> TrainRecipe:
    """The recipe that a user would write."""
    return TrainRecipe(
        model=ModelConfig(source=str(chosen.base)),
        lora=LoraConfig(r=16, alpha=16),
        data=DataConfig(max_tokens=chosen.tokens),
        optim=OptimConfig(
            name=OptimizerName.adamw,
            learning_rate=chosen.learning_rate,
            schedule=Schedule.cosine,
            warmup_fraction=0.03,
        ),
        trainer=TrainerConfig(
            batch_size=chosen.rows,
            max_steps=chosen.steps,
            gradient_checkpointing=False,
            log_every_steps=1,
            save_every_steps=10 * chosen.steps,
            seed=seed,
        ),
        engine=engine,
    )


def run(chosen: argparse.Namespace, name: str, seed: int, train: TokenRows, held_out: TokenRows) -> dict[str, Any]:
    """One fine-tune."""
    torch.manual_seed(seed)
    recipe = recipe_of(chosen, ENGINES[name], seed)
    model = attach_lora(load_base(chosen.base, QuantConfig()), recipe.lora)
    losses = Losses()
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    with tempfile.TemporaryDirectory() as work:
        trainer = build_trainer(
            model, load_tokenizer(chosen.base), recipe, train, held_out, Path(work) / "checkpoints", callback
        )
        trainer.add_callback(losses)
        before = held_out_loss(trainer)
        began = time.perf_counter()
        run_training(trainer, None)
        seconds = time.perf_counter() - began
        after = held_out_loss(trainer)
        trainer.restore_model()
    return {
        "engine": name,
        "seed": seed,
        "held_out_before": before,
        "held_out_after": after,
        "seconds": round(seconds, 1),
        "losses": losses.found,
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each engine: mean held-out loss, its distance from the reference's, and that of the curves."""
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        by_engine.setdefault(one["engine"], []).append(one)
    found = []
    for name, group in by_engine.items():
        row = {"engine": name, "held_out": float(np.mean([one["held_out_after"] for one in group]))}
        reference = {one["seed"]: one for one in by_engine.get(REFERENCE, [])}
        pairs = [(one, reference[one["seed"]]) for one in group if one["seed"] in reference]
        if pairs:
            shares = [one["held_out_after"] / other["held_out_after"] - 1 for one, other in pairs]
            curves = [np.abs(np.subtract(one["losses"], other["losses"])) for one, other in pairs]
            row["percent_by_seed"] = [round(100 * share, 3) for share in shares]
            row["percent"] = round(100 * float(np.mean(shares)), 3)
            row["largest_gap_of_curves"] = round(float(np.max(curves)), 4)
            row["mean_gap_of_curves"] = round(float(np.mean(curves)), 5)
        found.append(row)
    return found


def main() -> None:
    """Train, print, store, draw."""
    chosen = arguments()
    tokenizer = load_tokenizer(chosen.base)
    # An order that is the same everywhere, and not the alphabet's.
    files = sorted(chosen.text.rglob(chosen.files), key=lambda path: zlib.crc32(path.name.encode()))
    held_out_files, train_files = files[::20], [path for at, path in enumerate(files) if at % 20]
    work = Path(tempfile.mkdtemp(prefix="parity_"))
    train = stored(work / "train", rows_of(train_files, tokenizer, chosen.tokens, chosen.rows * chosen.steps))
    held_out = stored(work / "held_out", rows_of(held_out_files, tokenizer, chosen.tokens, chosen.held_out))
    runs = []
    for seed in range(chosen.seeds):
        for name in chosen.engines:
            runs.append(run(chosen, name, seed, train, held_out))
            last = runs[-1]
            if not math.isfinite(last["held_out_after"]):
                raise SystemExit(f"{name}, seed {seed}: the held-out loss is {last['held_out_after']}")
            print(
                f"{name:18} seed {seed}: held out {last['held_out_before']:.4f} -> {last['held_out_after']:.4f}, "
                f"{last['seconds']:.0f} s",
                flush=True,
            )
    rows = summary(runs)
    for row in rows:
        print(row)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    place = chosen.results / re.sub(r"\W+", "_", device.lower()).strip("_") / f"parity-{date.today().isoformat()}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in vars(chosen).items() if name not in ("base", "text", "results", "picture")
    }
    environment = {name: value for name, value in capture_environment().items() if name != "platform"}
    content = {"device": device, "base": chosen.base.name, "environment": environment, "settings": settings}
    place.write_text(json.dumps(content | {"summary": rows, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(place.name)
    if chosen.picture:
        chosen.picture.write_text(picture(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
