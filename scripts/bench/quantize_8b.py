"""Times quantization of a random Llama of 8B shape on one GPU: the kit's exports and the libraries' own examples.

Both sides get the same checkpoint (random weights, made here; a number of the decoder layers, all of embedding and
head) and the same calibration rows, each run in a process of its own, from the 16-bit folder to the quantized one.
With two numbers of layers, `per_layer_s` is the difference by layer and `whole_s` what it gives for all 32; with one,
the seconds by layer. `output_error` compares the last hidden states of the dequantized checkpoint with the source's,
so that a run that is fast and wrong shows. Each run is made once before on a tiny model, for what a first use compiles
and keeps. Writes results/<device>/quantize_8b-<date>.json after every run:

    python scripts/bench/quantize_8b.py --work /tmp/w --layers 4 --rows 128
    python scripts/bench/quantize_8b.py --work /tmp/w --layers 1 3 --rows 128 --only qlora_kit:awq llmcompressor:awq
    python scripts/bench/quantize_8b.py --work /tmp/w --shape tiny --layers 2 --rows 4 --seq-len 64     # on a CPU
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from merge import device_name
from quantize_8b_model import SHAPES, calibration_rows, make_pool, model_folder
from quantize_8b_stacks import STACKS, import_libraries

from qlora_kit.core.environment import capture_environment, package_versions
from qlora_kit.core.files import write_json

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("llmcompressor", "compressed-tensors", "gptqmodel", "torchao", "auto-round", "optimum", "numpy")
COLUMNS = {
    "stack": 14,
    "target": 7,
    "layers": 7,
    "rows": 5,
    "seq_len": 8,
    "seconds": 9,
    "per_layer_s": 12,
    "whole_s": 8,
    "peak_gb": 8,
    "output_error": 13,
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for the checkpoint three times")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3], help="decoder layers that are quantized")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=float, default=120, help="seconds for each run")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run begins")
    parser.add_argument("--only", nargs="+", default=[":".join(key) for key in STACKS], metavar="STACK:TARGET")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    for name in chosen.only:
        if tuple(name.split(":")) not in STACKS:
            parser.error(f"{name} is none of {', '.join(':'.join(key) for key in STACKS)}")
    return chosen


def child(chosen: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own does: make the checkpoints, or one run."""
    from quantize_8b_error import keep_expected, output_error

    work, shape = chosen.work, SHAPES[chosen.shape]
    if chosen.child == "prepare":
        make_pool(work, shape, max(chosen.layers), chosen.rows, chosen.seq_len)
        for layers in chosen.layers:
            keep_expected(work, model_folder(work, shape, layers))
        return {}
    stack, target = chosen.child.split(":")
    folder, out = model_folder(work, shape, chosen.layers[0]), work / "out"
    rows = calibration_rows(work, chosen.rows)
    import_libraries(stack, target)
    out.mkdir()
    found = timed(stack, target, folder, out, rows)
    return {**found, "output_error": round(output_error(work, folder, out), 5)}


def timed(stack: str, target: str, folder: Path, out: Path, rows: list[list[int]]) -> dict[str, Any]:
    """Seconds and peak memory of one run."""
    import resource

    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # the libraries' start is not timed
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    STACKS[stack, target](folder, out, rows)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    found = {"seconds": seconds, "peak_gb": peak / 1e9, "resident_gb": resident / 1e9, "file_gb": size / 1e9}
    return {name: round(value, 3) for name, value in found.items()}


def run_child(chosen: argparse.Namespace, what: str, layers: list[int]) -> dict[str, Any]:
    """A process of its own with a time limit; its last line is JSON. What it says goes to a log."""
    log = chosen.work / "logs" / f"{what.replace(':', '_')}_{'_'.join(map(str, layers))}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, __file__, "--child", what, "--work", chosen.work, "--shape", chosen.shape]
    line += ["--rows", chosen.rows, "--seq-len", chosen.seq_len, "--layers", *layers]
    shutil.rmtree(chosen.work / "out", ignore_errors=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            subprocess.run([*map(str, line)], stdout=stream, stderr=subprocess.STDOUT, timeout=chosen.limit, check=True)
        except subprocess.TimeoutExpired:
            return {"error": f"more than {chosen.limit:g} s"}
        except subprocess.CalledProcessError:
            return {"error": last_line(log)}
    found: dict[str, Any] = json.loads(last_line(log))
    return found


def warm_up(chosen: argparse.Namespace) -> None:
    """Every run once on a tiny model; what goes wrong will go wrong again."""
    tiny = argparse.Namespace(
        **{**vars(chosen), "work": chosen.work / "tiny", "shape": "tiny", "rows": 4, "seq_len": 64}
    )
    tiny.work.mkdir()
    for what in ("prepare", *chosen.only):
        run_child(tiny, what, [1])


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def add_rates(rows: list[dict[str, Any]], whole: int) -> None:
    """Seconds by layer and for the whole model: from the row and, where there is one, that with the fewest layers."""
    for row in rows:
        if "seconds" not in row:
            continue
        same = [other for other in rows if "seconds" in other and _same(other, row)]
        least = min(same, key=lambda other: int(other["layers"]))
        apart = row["layers"] - least["layers"]
        rate = (row["seconds"] - least["seconds"]) / apart if apart else row["seconds"] / row["layers"]
        row["per_layer_s"] = round(rate, 3)
        row["whole_s"] = round(row["seconds"] + rate * (whole - row["layers"]), 1)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("stack", "target", "rows", "seq_len"))


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in row:
        return f"{row['stack']:>14}{row['target']:>7}{row['layers']:>7}  {row['error']}"
    return "".join(f"{row[name]:>{width}}" for name, width in COLUMNS.items())


def main() -> None:
    """Make the checkpoints, run, print and store after each run."""
    chosen = arguments()
    chosen.work = chosen.work.resolve()
    if chosen.child:
        print("\n" + json.dumps(child(chosen)))
        return
    began, name = time.monotonic(), device_name()
    shutil.rmtree(chosen.work, ignore_errors=True)
    chosen.work.mkdir(parents=True)
    layers = sorted(set(chosen.layers))
    if failed := run_child(chosen, "prepare", layers):
        raise SystemExit(f"the checkpoint was not made: {failed['error']}")
    warm_up(chosen)
    print(f"{name}; ready after {time.monotonic() - began:.0f} s; logs in {chosen.work / 'logs'}")
    print("".join(f"{column:>{width}}" for column, width in COLUMNS.items()), flush=True)
    file = "quantize_8b" if chosen.shape == "8b" else f"quantize_{chosen.shape}"
    place = chosen.results / re.sub(r"\W+", "_", name.lower()).strip("_") / f"{file}-{date.today().isoformat()}.json"
    environment = {name: value for name, value in capture_environment().items() if name != "platform"}
    versions = {**environment, "libraries": package_versions(LIBRARIES)}
    rows: list[dict[str, Any]] = []
    for what in chosen.only:
        for count in layers:
            if time.monotonic() - began > chosen.budget:
                print(f"{what} with {count} layers was left out: the {chosen.budget:g} s are over")
                continue
            stack, target = what.split(":")
            row = {"stack": stack, "target": target, "layers": count, "rows": chosen.rows, "seq_len": chosen.seq_len}
            rows.append(row | run_child(chosen, what, [count]))
            add_rates(rows, SHAPES[chosen.shape].layers)
            print(shown(rows[-1]), flush=True)
            write_json(place, {"device": name, "shape": chosen.shape, "versions": versions, "rows": rows})
    shutil.rmtree(chosen.work / "out", ignore_errors=True)
    print(place)


if __name__ == "__main__":
    main()
