"""Runs llama.cpp's converter on a folder, in a process of its own, once for all files that are made of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.console.bar import BYTES, bar
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.core.units import counted
from qlora_kit.export.checks.fault import ELSEWHERE
from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf.converter.converted import read_converted
from qlora_kit.formats.gguf.converter.package import converter_folder, find_known
from qlora_kit.formats.gguf.metadata import read_full_config
from qlora_kit.weights.headers import FLOATS, read_headers

if TYPE_CHECKING:
    from qlora_kit.formats.gguf.model import GgufModel

_ASKED_EVERY = 0.2  # seconds
_SHOWN_AFTER = 5.0  # seconds, which a small model takes
_SHOWN_LINES = 3
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # by somebody else; llama.cpp ends itself by others
_TOLD = re.compile(r"error loading model|GGML_ASSERT")  # lines of llama.cpp that say why
_FURTHER = re.compile(r"^mtp\.|\.mtp\.|^model\.(?:language_model\.)?layers\.(\d+)\.")
_ROOT = Path(__file__).resolve().parents[4]  # where the package qlora_kit lies


class Conversion:
    """The 16-bit file that llama.cpp's converter makes of a folder, written when first asked for.

    Args:
        model_dir: Hugging Face folder with 16- or 32-bit weights.
        room: an existing folder on a disk that can hold the model once more; what is written there goes when this
            object does.
    """

    def __init__(self, model_dir: Path, room: Path) -> None:
        self.model_dir = model_dir
        self._room = room

    def model(self, config: ConfigFields) -> "GgufModel":
        """What the file holds.

        Raises:
            RecipeError: the converter is not installed, or does not know the architecture.
            RunError: it failed.
        """
        return read_converted(self.file, config)

    @cached_property
    def file(self) -> Path:
        """The file.

        Raises:
            RecipeError: the converter is not installed, or does not know the architecture.
            RunError: it failed, or there is no room for the file.
        """
        from qlora_kit.export.merge import refuse_full_disk

        config = read_full_config(self.model_dir)
        known, tensors = find_known(config), read_headers(self.model_dir)
        _tell_further(tensors, config)
        values = Counter[str]()
        for tensor in tensors.values():
            if tensor.dtype in FLOATS:  # old checkpoints hold masks too
                values[tensor.dtype] += tensor.rows * tensor.width
        kind = values.most_common(1)[0][0]
        kind = kind if kind in ("BF16", "F16") else "F32"
        expected = (4 if kind == "F32" else 2) * values.total()
        refuse_full_disk(expected, self._room, "the 16-bit file that llama.cpp's converter makes")
        folder = Path(tempfile.mkdtemp(prefix=".converted.", suffix=".partial", dir=self._room))
        self._removed = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        out = folder / "model.gguf"
        job = {
            "converter": str(converter_folder()),
            "model": str(self.model_dir.resolve()),
            "architecture": known.registered,
            "kind": kind,
            "out": str(out),
            "values": "yes",
        }
        try:
            _run(folder, job, expected)
        except BaseException:
            self._removed()
            raise
        return out


def why_not_converted(folder: Path, config: ConfigFields) -> str:
    """Why the converter cannot name or order a folder's tensors, or llama.cpp would not load them; empty if both can.

    The file is planned from the heads of the safetensors files, and llama.cpp shown its head, in a process of its own,
    once for a folder; some seconds.

    Raises:
        RecipeError: the converter is not installed, or does not know the architecture.
        RunError: its process was killed.
    """
    return _planned(folder.resolve(), find_known(config).registered, (folder / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _planned(folder: Path, registered: str, _changed: int) -> str:
    job = {"converter": str(converter_folder()), "model": str(folder), "architecture": registered}
    with tempfile.TemporaryDirectory() as room:
        place = {"kind": "BF16", "out": str(Path(room) / "head.gguf"), "values": ""}
        return _ended(Path(room), {**job, **place}, lambda: None)


def _tell_further(names: Iterable[str], config: ConfigFields) -> None:
    """Say that layers behind the last one, which predict further tokens, are left out."""
    layers = {**config, **(config.get("text_config") or {})}.get("num_hidden_layers")
    found = [(name, _FURTHER.search(name)) for name in names]
    behind = [name for name, at in found if at and (at[1] is None or _is_from(at[1], layers))]
    if behind:
        log.info(f"GGUF: layers that predict further tokens are left out ({counted(len(behind), 'tensor')})")


def _is_from(layer: str, layers: object) -> bool:
    return isinstance(layers, int) and int(layer) >= layers


def _run(folder: Path, job: dict[str, str], expected: int) -> None:
    """Run the child and show how much of the file is there."""
    out = Path(job["out"])
    with bar("llama.cpp's converter", expected, BYTES, after=_SHOWN_AFTER) as shown:

        def show() -> None:
            written = out.stat().st_size if out.is_file() else 0
            shown.advance(max(0, min(written, expected) - shown.done))

        reason = _ended(folder, job, show)
    if reason:
        raise RunError(f"llama.cpp cannot have this model: {reason}", fix=ELSEWHERE)


def _ended(folder: Path, job: dict[str, str], show: Callable[[], None]) -> str:
    """Run the child in a folder of its own, and show how far it is; what it has against the model, if anything.

    Raises:
        RunError: somebody killed it, which says nothing of the model.
    """
    job_file, result_file, log_file = folder / "job.json", folder / "result.json", folder / "log.txt"
    job_file.write_text(json.dumps(job), "utf-8")
    line = [sys.executable, "-m", "qlora_kit.formats.gguf.converter.child", str(job_file), str(result_file)]
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The converter would look for a gguf of its own beside it, and libraries for files on a hub.
    environment = {**os.environ, "PYTHONPATH": path, "NO_LOCAL_GGUF": "1", "HF_HUB_OFFLINE": "1"}
    environment["GGML_NO_BACKTRACE"] = "1"  # else llama.cpp starts a debugger where it ends the process
    with (
        log_file.open("wb") as log,
        # it ends with its input, which ends with this process
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment) as child,
    ):
        try:
            while child.poll() is None:
                time.sleep(_ASKED_EVERY)
                show()
        finally:
            child.kill()
    if child.returncode in _KILLED:
        what = f"llama.cpp's converter was killed by signal {-child.returncode}"
        raise RunError(what, fix="free some main memory, for want of which systems kill")
    return _reason(child.returncode, result_file, log_file) if child.returncode else ""


def _reason(code: int, result_file: Path, log_file: Path) -> str:
    """What the converter or llama.cpp said; of a process that was ended, its last lines."""
    lines = log_file.read_text("utf-8", "replace").strip().splitlines()
    told = [line for line in lines if _TOLD.search(line)]
    if told:
        return " | ".join(told[-1:])
    if result_file.is_file():
        return str(json.loads(result_file.read_text("utf-8")).get("error"))
    return f"the process ended with {code}: {' | '.join(lines[-_SHOWN_LINES:])}"
