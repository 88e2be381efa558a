"""Is what differs after a resume on a GPU the noise of its kernels? A run, the same again, and one taken up half way.

All three go through `qlora-kit train` on a checkpoint and rows that `user_line.py` wrote. Where the second run is as
far from the first as the resumed one is, a resume adds nothing of its own:

    python scripts/bench/resume_noise.py --work /tmp/user_line --model llama_1b engine=fast
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24


def main() -> None:
    """Make the runs and print how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that user_line.py filled")
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("words", nargs="*", help="further words of the command line")
    asked = parser.parse_args()
    place = asked.work / "resume"
    shutil.rmtree(place, ignore_errors=True)
    words = [
        *("data=rows", "data.max_tokens=2048", "trainer.batch_size=4", f"trainer.max_steps={STEPS}"),
        *(f"trainer.save_every_steps={STEPS // 2}", "trainer.keep_checkpoints=2", "optim.learning_rate=1e-3"),
        *(f"model.source={asked.work / asked.model}", f"data.train_file={asked.work / 'mixed.jsonl'}", *asked.words),
    ]
    first, again = (_train(place / name, words) for name in ("first", "again"))
    resumed = place / "resumed"
    shutil.copytree(first, resumed)
    for name in ("result.json", "adapter"):
        target = resumed / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    shutil.rmtree(resumed / "checkpoints" / f"checkpoint-{STEPS}")
    _run(place, [f"resume={resumed}"])
    reference = _losses(first)
    for name, run in (("the same run again", again), ("the resumed run", resumed)):
        apart = [abs(one - other) for one, other in zip(reference, _losses(run), strict=True)]
        early, late = apart[: STEPS // 2], apart[STEPS // 2 :]
        losses = f"losses {max(early):.2e} apart before step {STEPS // 2}, {max(late):.2e} after"
        print(f"{name}: {losses}; {_adapters(first, run)}", flush=True)


def _train(place: Path, words: list[str]) -> Path:
    place.mkdir(parents=True)
    _run(place, words)
    (recipe,) = place.glob("outputs/*/*/recipe.yaml")
    return recipe.parent


def _run(place: Path, words: list[str]) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "qlora_kit", "train", *words]
    subprocess.run(command, cwd=place, env=environment, stderr=subprocess.DEVNULL, check=True)


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _adapters(one: Path, other: Path) -> str:
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return f"adapter {apart:.2e} of {max(float(part.abs().max()) for part in ours.values()):.2e}"


if __name__ == "__main__":
    main()
