"""Whether a merge is far from its model by a fault or by chance: tiny random families, and wider, calmer ones.

A tiny random model turns the rounding of bf16 into other answers: a router of four experts that are nearly equally good
takes another one, or scores of attention that nothing divides. Each family is trained and exported through the command
line, twice: tiny, and wider with weights as calm as trained ones. The trained model is then compared with

- the merged folder, and the same folder with the experts that the trained model chooses;
- its own weights, update included, in fp32: what the merge and the readers' code add beside rounding;
- these weights with noise of the size of bf16's rounding, thrice: what bf16 alone does;
- these weights, and the inputs of linear maps, rounded to Q8_0: what Q8_0 alone does, beside llama.cpp's file.

    python scripts/bench/wider_models.py --work /tmp/wider --tokenizer FOLDER [--out FILE] [family ...]
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import wider_measure as measure
import wider_shapes as shapes

from qlora_kit.cli.verbs import main as command_line
from qlora_kit.core.files import read_json, write_json
from qlora_kit.evaluation.reference import open_models
from qlora_kit.evaluation.sixteen_bit import load_sixteen_bit
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.model.load import quiet_libraries
from qlora_kit.runs.open import open_run

FILES = ("merged_16bit", "gguf_q8_0")
SEEDS = 3
HELD_OUT = 8  # rows
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")


def write_rows(path: Path) -> None:
    """Conversations that are nearly alike."""
    verbs, things = ["turn on", "dim", "read", "lock", "open"], ["the lamp", "the news", "the door", "the light"]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(48):
            what = f"{verbs[number % 5]} {things[(number // 5) % 4]}"
            turns = [
                {"role": "user", "content": f"Please {what}, request number {number}."},
                {"role": "assistant", "content": f"Done: I did {what} for request {number}. Anything else?"},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


def apart(job: Callable[[], object], log: Path, folder: Path) -> int:
    """Run a job in a copy of this process, which imports nothing again; returns its exit status."""

    def run() -> None:
        os.chdir(folder)
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            status = job()
        sys.exit(status if isinstance(status, int) else 0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def measured(family: str, wide: bool, work: Path, tokenizer: Path) -> dict[str, Any]:
    """Build, train, export and compare one checkpoint."""
    place = work / f"{family}-{'wide' if wide else 'tiny'}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write_rows(rows := place / "rows.jsonl")
    base, result = place / "base", place / "measured.json"
    line = [f"model.source={base}", "data=rows", f"data.train_file={rows}", f"data.eval_rows={HELD_OUT}"]
    line += ["data.max_tokens=256", "trainer.max_steps=2", "trainer.batch_size=2", "trainer.gradient_accumulation=1"]
    line += ["optim.learning_rate=2e-3", "name=plain"]
    if apart(lambda: shapes.build(family, wide, tokenizer, base), place / "build.log", place):
        return {"failed": (place / "build.log").read_text()[-400:]}
    if apart(lambda: command_line(["train", *line]), place / "train.log", place):
        return {"failed": (place / "train.log").read_text()[-400:]}
    run = next((place / "outputs/plain").iterdir())
    export = ["export", f"run={run}", "export.calibration_rows=4", f"export=[{','.join(FILES)}]"]
    apart(lambda: command_line(export), place / "export.log", place)
    if apart(lambda: compare(run, result), place / "measure.log", place):
        return {"failed": (place / "measure.log").read_text()[-400:]}
    shutil.rmtree(place / "base")
    shutil.rmtree(place / "outputs")
    return dict(read_json(result))


def compare(run_folder: Path, result: Path) -> None:
    """Write down how far the files of a run, and its weights rounded otherwise, are from its model."""
    quiet_libraries()
    torch.set_num_threads(1)
    run = open_run(str(run_folder))
    rows = run.held_out().scored(HELD_OUT)
    scorer = open_models(run)["adapter"]
    assert isinstance(scorer, TorchScorer)
    with scorer.lent() as trained:
        said = measure.say(trained, rows)
        weights = measure.weights_as_trained(trained)
    scorer.close()
    folder = run.directory.exports / "merged_16bit"
    merged = load_sixteen_bit(folder).eval()
    text = merged.config.get_text_config(decoder=True)
    found: dict[str, Any] = {"width": text.hidden_size, "layers": text.num_hidden_layers}
    stored = dict(merged.named_parameters())
    found["not_the_bf16_of_what_was_trained"] = sum(
        int((weight.to(torch.bfloat16).float() != stored[name]).sum()) for name, weight in weights.items()
    )

    def far(forced: measure.Routes | None = None) -> dict[str, Any]:
        return asdict(measure.distance(rows, said, measure.say(merged, rows, forced)))

    found["merged_16bit"] = far()
    if any(said.routes):
        found["merged_16bit_with_the_trained_routes"] = far(said.routes)
    measure.put(merged, weights, lambda weight: weight)
    found["in_fp32"] = far()
    found["noise_of_bf16"] = []
    for seed in range(SEEDS):
        measure.put(merged, weights, partial(measure.near_bf16, seed=seed))
        found["noise_of_bf16"].append(far())
    measure.put(merged, weights, lambda weight: weight)
    measure.as_q8_0(merged)
    quantized = measure.distance(rows, said, measure.Said(measure.say(merged, rows).logprobs, said.routes))
    found["rounded_to_q8_0"] = {"mean_kl": quantized.mean_kl, "max_kl": quantized.max_kl}
    found["files"] = {name: _of_file(run.directory.exports / name, result.parent) for name in FILES}
    write_json(result, found)


def _of_file(folder: Path, place: Path) -> dict[str, Any]:
    if (folder / "manifest.json").is_file():
        return {"mean_kl": (read_json(folder / "manifest.json").get("fidelity") or {}).get("mean_kl")}
    lines = (place / "export.log").read_text(errors="replace").splitlines()
    return {"reason": next((line for line in lines if line.startswith(f"{folder.name}: failed")), "not written")[:300]}


def line_of(name: str, found: dict[str, Any]) -> str:
    """One line for people."""
    if "failed" in found:
        return f"{name}: failed: {found['failed'][-200:]}"
    merged, noise, q8 = found["merged_16bit"], found["noise_of_bf16"], found["files"]["gguf_q8_0"]
    control = ", ".join(f"{one['mean_kl']:.5f}" for one in noise)
    forced = found.get("merged_16bit_with_the_trained_routes", {}).get("mean_kl")
    return (
        f"{name}: merged {merged['mean_kl']:.5f}, flipped {merged['flipped']} + {merged['jumped']} of "
        f"{merged['choices']}, trained routes {forced if forced is None else round(forced, 5)}, fp32 "
        f"{found['in_fp32']['mean_kl']:.1e}, noise {control}, Q8_0 {q8.get('mean_kl') or q8.get('reason')}, rounded "
        f"{found['rounded_to_q8_0']['mean_kl']:.4f}, other bits {found['not_the_bf16_of_what_was_trained']}"
    )


def main() -> None:
    """Measure one family after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(shapes.FAMILIES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with SmolLM2's tokenizer")
    parser.add_argument("--only", choices=("tiny", "wide"))
    parser.add_argument("--device", default="", help="in words, for the record")
    parser.add_argument("--out", type=Path, help="JSON that the results are added to")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    work = options.work.resolve()
    for family in options.families:
        for size in ("tiny", "wide"):
            if options.only in (None, size):
                began = time.time()
                found = measured(family, size == "wide", work, options.tokenizer.resolve())
                found["seconds"] = round(time.time() - began)
                print(line_of(f"{family} {size}", found), flush=True)
                if options.out:
                    _add(options.out, options.device, family, size, found)


def _add(path: Path, device: str, family: str, size: str, found: dict[str, Any]) -> None:
    record: dict[str, Any] = dict(read_json(path)) if path.is_file() else {}
    record |= {"device": device or record.get("device", ""), "what": (__doc__ or "").split("\n")[0]}
    at = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    record["commit"] = subprocess.run(at, capture_output=True, text=True, check=False).stdout.strip()
    record["versions"] = {name: metadata.version(name) for name in PACKAGES}
    families: dict[str, dict[str, Any]] = record.setdefault("families", {})
    families.setdefault(family, {})[size] = found
    write_json(path, record)


if __name__ == "__main__":
    main()
