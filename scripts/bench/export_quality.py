"""Fine-tunes two models, exports each to every target, and scores every file against the model that was trained.

    python scripts/bench/small_base.py --out /tmp/small_base
    python scripts/bench/export_quality.py --small-base /tmp/small_base --work /tmp/export_quality

SmolLM2-135M is the demo base; its widths are no multiples of 256, so K-quants fall back to other blocks. The small base
has such widths. Prints one table and writes results/<device>/export_quality-<date>.json. A run that exists in the work
folder is used again, and so is every export in it.
"""

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from prepare import device_name as processor_name

from qlora_kit.core.environment import capture_environment

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--small-base", type=Path, help="a folder that small_base.py made; without, the demo alone")
    parser.add_argument("--models", nargs="*", default=["smollm2_135m", "small"])
    parser.add_argument("--targets", nargs="*", required=True, metavar="RECIPE", help="of recipes/export")
    parser.add_argument("--wide-targets", nargs="*", default=[], metavar="RECIPE", help="for the small model alone")
    parser.add_argument("--narrow-targets", nargs="*", default=[], metavar="RECIPE", help="for the demo alone")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--small-steps", type=int, default=1500)
    parser.add_argument("--kl-rows", type=int, default=100)
    parser.add_argument("--task-rows", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def kit(work: Path, *line: str) -> int:
    """Run a verb of the kit; what it says goes through."""
    print(f"\n$ qlora-kit {' '.join(line)}", flush=True)
    return subprocess.run([sys.executable, "-m", "qlora_kit", *line], cwd=work, check=False).returncode


def recipe_line(name: str, chosen: argparse.Namespace) -> list[str]:
    """How a model is trained."""
    common = ["data=home_commands", "quant.compute_dtype=float32", f"name={name}"]
    if name == "small":
        return [
            "model=demo",
            f"model.source={chosen.small_base.resolve()}",
            *common,
            "quant=nf4_double",
            "lora=all_linear",
            "lora.r=64",
            "lora.alpha=64",
            "optim=adamw",
            "optim.learning_rate=0.003",
            "trainer=cpu",
            f"trainer.max_steps={chosen.small_steps}",
        ]
    return ["experiment=smollm2_135m_home_commands_cpu", f"name={name}", f"trainer.max_steps={chosen.steps}"]


def run_of(name: str, chosen: argparse.Namespace) -> Path:
    """The finished run of a model, trained now unless it is there."""
    rows = chosen.work / "data" / "home_commands"
    if not rows.is_dir():
        subprocess.run([sys.executable, "-m", "qlora_kit.data.home_commands", "--out", str(rows)], check=True)
    found = sorted((chosen.work / "outputs" / name).glob("*/result.json"))
    if not found:
        if kit(chosen.work, "train", *recipe_line(name, chosen)) != 0:
            raise SystemExit(f"{name} was not trained")
        found = sorted((chosen.work / "outputs" / name).glob("*/result.json"))
    newest: Path = found[-1].parent
    return newest


def targets_of(name: str, chosen: argparse.Namespace) -> list[str]:
    """Recipes of a model's exports."""
    return [*chosen.targets, *(chosen.wide_targets if name == "small" else chosen.narrow_targets)]


def export_all(run: Path, targets: list[str], chosen: argparse.Namespace) -> list[str]:
    """Export what is not there yet; returns what is missing after that."""
    missing = [target for target in targets if not (run / "exports" / target / "manifest.json").is_file()]
    if missing:
        kit(chosen.work, "export", f"run={run}", f"export=[{','.join(missing)}]", f"export.score_rows={chosen.kl_rows}")
    return [target for target in targets if not (run / "exports" / target / "manifest.json").is_file()]


def rows_of(name: str, run: Path) -> list[dict[str, Any]]:
    """A model's rows of the table, from its scores and manifests."""
    scored = {row["name"]: row for row in json.loads((run / "eval.json").read_text(encoding="utf-8"))["rows"]}
    adapter = scored["adapter"]
    rows = []
    for target, row in scored.items():
        if target in ("base", "adapter"):
            continue
        manifest = json.loads((run / "exports" / target / "manifest.json").read_text(encoding="utf-8"))
        fidelity = row["fidelity"]
        rows.append(
            {
                "model": name,
                "target": target,
                "size_mb": round(row["size_bytes"] / 1e6, 1),
                "masked_loss": fidelity["loss"],
                "adapter_masked_loss": adapter["fidelity"]["loss"],
                "kl_mean": fidelity["mean_kl"],
                "kl_p99": fidelity["p99_kl"],
                "top1": fidelity["same_top"],
                "task": row["exact_match"],
                "adapter_task": adapter["exact_match"],
                "reader": manifest.get("reader", manifest["format"]),
                "seconds": manifest["seconds"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, for a terminal."""
    lines = [
        f"{'model':13} {'target':22} {'MB':>7} {'loss':>7} {'KL':>8} {'KL p99':>8} {'top1':>6} {'task':>5} {'s':>6}"
    ]
    for row in rows:
        task = "" if row["task"] is None else f"{row['task']:.0%}"
        lines.append(
            f"{row['model']:13} {row['target']:22} {row['size_mb']:7.1f} {row['masked_loss']:7.4f} "
            f"{row['kl_mean']:8.5f} {row['kl_p99']:8.4f} {row['top1']:6.1%} {task:>5} {row['seconds']:6.1f}"
        )
    return "\n".join(lines)


def device_name() -> str:
    """The GPU, or the processor and how many of it."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor_name()


def main() -> None:
    """Train, export, score, store."""
    chosen = arguments()
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.work = chosen.work.resolve()
    rows, missing = [], []
    for name in chosen.models:
        if name == "small" and chosen.small_base is None:
            continue
        run = run_of(name, chosen)
        missing += [f"{name}: {target}" for target in export_all(run, targets_of(name, chosen), chosen)]
        sizes = (f"eval.kl_rows={chosen.kl_rows}", f"eval.task_rows={chosen.task_rows}")
        if kit(chosen.work, "eval", f"run={run}", *sizes) != 0:
            raise SystemExit(f"{name} was not scored")
        rows += rows_of(name, run)
    print(table(rows))
    environment = {name: value for name, value in capture_environment().items() if name != "platform"}
    device = re.sub(r"\W+", "_", device_name().lower()).strip("_")
    place = chosen.results / device / f"export_quality-{date.today().isoformat()}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    content = {"versions": environment["packages"], "environment": environment, "rows": rows, "missing": missing}
    place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(place)
    if missing:
        raise SystemExit(f"missing: {', '.join(missing)}")


if __name__ == "__main__":
    main()
