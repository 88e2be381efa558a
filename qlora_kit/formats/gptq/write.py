"""GPTQ: gptqmodel chooses the codes; the file is the source folder with the packed tensors in place."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.bar import bar
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.core.extras import require
from qlora_kit.core.files import read_json
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.export.group_sizes import WHOLE_ROW, check_group_size, linear_input_widths
from qlora_kit.export.linear_shapes import linear_shapes
from qlora_kit.export.rewrite import rewrite_checkpoint, weight_files
from qlora_kit.formats.gptq.layers import LayerSettings, check_bits, dynamic_entries, left_out_entry, plan_layers
from qlora_kit.formats.gptq.layout import PACKED
from qlora_kit.formats.gptq.rounding import write_rounding
from qlora_kit.formats.gptqmodel_settings import EXTRA, set_up_gptqmodel
from qlora_kit.schema.export import GptqMethod, GptqTarget

if TYPE_CHECKING:
    from torch import Tensor

# What a reader needs; the library also notes its temporary folder and its scheduling.
KEPT_SETTINGS = (
    "bits",
    "group_size",
    "desc_act",
    "sym",
    "lm_head",
    "quant_method",
    "checkpoint_format",
    "pack_dtype",
    "dynamic",
)
KEPT_META = ("quantizer", "uri", "damp_percent", "static_groups", "true_sequential", "act_group_aware")


def write_gptq(model_dir: Path, out_dir: Path, target: GptqTarget, calibration: Sequence[Sequence[int]]) -> None:
    """Quantize a merged 16-bit model folder with GPTQ (Frantar et al. 2022), on a GPU when there is one.

    With `target.method` rounding the same layout is filled by plain rounding.

    Args:
        out_dir: an existing, empty folder.
        calibration: token-id rows, already rendered with the chat template; rounding looks at none.

    Raises:
        RecipeError: bits, a group size or an override do not fit the model, no calibration rows, or gptqmodel is not
            installed.
        RunError: gptqmodel left layers unquantized.
    """
    if target.method is GptqMethod.rounding:
        write_rounding(model_dir, out_dir, target)
        return
    rows = [list(row) for row in calibration if len(row)]
    check_bits(target)
    if not rows:
        raise RecipeError("GPTQ needs calibration rows and got none")
    plan = _plan(model_dir, target)
    model_dir = model_dir.resolve()
    # A stopped library's threads still write, and what cannot be removed yet must not hide why it stopped.
    with tempfile.TemporaryDirectory(prefix=".gptq-", dir=out_dir.resolve(), ignore_cleanup_errors=True) as work:
        made = Path(work) / "quantized"
        set_up_gptqmodel()
        # It writes a folder `logs` into the working folder.
        with contextlib.chdir(work), _quiet(), _progress(model_dir) as layer_done:
            _quantize(model_dir, made, _config(target, plan, Path(work) / "offloaded"), rows, layer_done)
        quantization = _portable(read_json(made / "config.json")["quantization_config"])
        packed = _packed_tensors(made)
        _check_overrides(packed, plan, target)
        if left := _left_out(linear_shapes(model_dir), packed, plan):
            log.info(f"GPTQ: {left}")
            quantization["dynamic"] = {**(quantization.get("dynamic") or {}), **left_out_entry(left.names)}
        rewrite_checkpoint(model_dir, out_dir, packed, quantization)


def _plan(model_dir: Path, target: GptqTarget) -> dict[str, LayerSettings]:
    """The settings of each layer where patterns change some, else nothing."""
    if target.overrides:
        return plan_layers(linear_shapes(model_dir), target)
    if problem := check_group_size(target.group_size, linear_input_widths(read_json(model_dir / "config.json"))):
        raise RecipeError([problem])
    return {}


def _config(target: GptqTarget, plan: Mapping[str, LayerSettings], offloaded: Path) -> Any:
    gptqmodel = require("gptqmodel", "GPTQ export", EXTRA)
    sizes = {target.group_size, *(layer.group_size for layer in plan.values() if layer.quantized)}
    return gptqmodel.QuantizeConfig(
        bits=target.bits,
        group_size=target.group_size,
        desc_act=target.desc_act,
        sym=target.sym,
        damp_percent=target.damping,
        # Ordering columns by group has no meaning with desc_act, nor when there is one group; the library refuses both.
        act_group_aware=not target.desc_act and WHOLE_ROW not in sizes,
        dynamic=dynamic_entries(plan, target) or None,
        offload_to_disk=True,
        offload_to_disk_path=str(offloaded),
    )


def _quantize(model_dir: Path, made: Path, config: Any, rows: list[list[int]], layer_done: Callable[..., None]) -> None:
    gptqmodel = require("gptqmodel", "GPTQ export", EXTRA)
    import torch

    on_gpu = torch.cuda.is_available()
    model = gptqmodel.GPTQModel.load(
        str(model_dir),
        config,
        device="cuda" if on_gpu else "cpu",
        # Six times the speed of bfloat16 on CPUs without bfloat16 units; the file keeps the source's dtype.
        dtype="auto" if on_gpu else torch.float32,
    )
    batch = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.layer_callback = layer_done
    model.quantize(batch, batch_size=1)
    model.save(str(made))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's banner, tables, bars and what is deprecated for it from the console."""
    notes = logging.getLogger("tokenicer")
    level = notes.level
    notes.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="gptqmodel")
            yield
    finally:
        notes.setLevel(level)


@contextlib.contextmanager
def _progress(model_dir: Path) -> Iterator[Callable[..., None]]:
    """A bar on standard error, and the function that gptqmodel calls at the end of each layer."""
    layers = read_json(model_dir / "config.json").get("num_hidden_layers")
    with bar("GPTQ", layers, "layer") as one:

        def layer_done(layer_idx: int, submodule_finalized: bool) -> None:
            # Called twice a layer; the first call comes when its weights are chosen.
            if not submodule_finalized:
                one.advance(layer_idx + 1 - one.done)

        yield layer_done


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: settings[name] for name in KEPT_SETTINGS if name in settings}
    meta = settings.get("meta") or {}
    return {**kept, "meta": {name: meta[name] for name in KEPT_META if name in meta}}


def _packed_tensors(made: Path) -> dict[str, dict[str, "Tensor"]]:
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {}
    for path in weight_files(made):
        for name, tensor in load_file(path).items():
            module, _, kind = name.rpartition(".")
            if kind in PACKED:
                found.setdefault(f"{module}.weight", {})[name] = tensor
    if not found:
        raise RunError("gptqmodel quantized no layer of this model")
    return found


def _left_out(
    shapes: Mapping[str, object], packed: Mapping[str, object], plan: Mapping[str, LayerSettings]
) -> Unquantized | None:
    """Layers that the library left as they were, though nobody asked it to."""
    asked = [name for name in shapes if name not in plan or plan[name].quantized]
    left = tuple(name for name in asked if f"{name}.weight" not in packed)
    return Unquantized(left, len(asked), "gptqmodel does not quantize them in this family") if left else None


def _check_overrides(packed: Mapping[str, object], plan: Mapping[str, LayerSettings], target: GptqTarget) -> None:
    base = LayerSettings(target.bits, target.group_size)
    wanted = [name for name, settings in plan.items() if settings.quantized and settings != base]
    left = [name for name in wanted if f"{name}.weight" not in packed]
    if left:
        raise RunError(
            f"gptqmodel quantized {len(wanted) - len(left)} of {len(wanted)} layers that overrides name; not {left[0]}",
            fix=f"overrides: {{'{left[0]}': {{skip: true}}}} in front of the others",
        )
