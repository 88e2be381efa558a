"""A GGUF base with a GGUF adapter beside it, as llama.cpp itself applies it."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import require
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.llama_cpp import default_threads
from qlora_kit.formats.gguf.llama_library import LibraryEngine, LibraryUnusable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_HANDLE = ctypes.c_void_p


class LlamaCppLora:
    """A base and its adapter, opened by llama.cpp.

    Args:
        base_file: GGUF file of the base.
        lora_file: GGUF file of the adapter.
        threads: threads of the arithmetic; by default one fewer than this process has cores, at most 32.

    Raises:
        RecipeError: the xllamacpp package is not installed.
        RunError: llama.cpp cannot load either file, or the adapter is of another model.
    """

    def __init__(self, base_file: Path, lora_file: Path, *, threads: int | None = None) -> None:
        require("xllamacpp", "scoring a GGUF file", EXTRA)
        try:
            self._engine = _LoraEngine(base_file, lora_file, threads or default_threads())
        except LibraryUnusable as error:
            what = f"this xllamacpp cannot load an adapter: {error}"
            raise RunError(what, fix="pip install 'xllamacpp==2026.10.11549'") from error

    def close(self) -> None:
        """Free the model and the adapter."""
        self._engine.close()

    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Natural-log probabilities of the token after each position, float32 of shape [positions, vocabulary]."""
        return self._engine.log_probabilities(token_ids, positions)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The greedy continuation; ends before the first token the base's file names as an end of generation."""
        return self._engine.generate(prompt_ids, max_new_tokens)[0]


class _LoraEngine(LibraryEngine):
    """The C interface with one adapter applied to every context."""

    def __init__(self, base_file: Path, lora_file: Path, threads: int) -> None:
        super().__init__(base_file, threads)
        try:
            load, self._apply = self._lib.llama_adapter_lora_init, self._lib.llama_set_adapters_lora
        except AttributeError as error:
            self.close()
            raise LibraryUnusable(str(error)) from error
        load.restype, load.argtypes = _HANDLE, [_HANDLE, ctypes.c_char_p]
        self._apply.restype = ctypes.c_int32
        self._apply.argtypes = [_HANDLE, ctypes.POINTER(_HANDLE), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)]
        # The model owns it and frees it.
        self._adapter = load(self._model, str(lora_file).encode())
        if not self._adapter:
            self.close()
            raise RunError(f"llama.cpp cannot load {lora_file}, or it was made for another model than {base_file.name}")

    def _open_context(self, tokens: int) -> None:
        super()._open_context(tokens)
        if self._apply(self._context, (_HANDLE * 1)(self._adapter), 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise RunError("llama.cpp did not apply the adapter")
