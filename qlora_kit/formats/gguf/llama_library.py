"""llama.cpp's C interface, reached through the library inside the xllamacpp wheel.

The wheel's extension module exports the functions of `llama.h`; calling them gives the whole vocabulary of every
position in one pass, where the wheel's own server writes each probability as JSON (150 times slower, measured). Three
structures of `llama.h` are touched beyond opaque use, and each is checked when it is: the first four fields of the
context parameters must hold their documented defaults, a fresh batch must have the pointers it should, and parameters
of a model must hold the defaults of a known layout. Where a check fails, `LibraryUnusable` tells the caller to take
another way.
"""

import ctypes
import importlib.util
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TOKENS_PER_PASS = 256  # bounds the logits held by llama.cpp: 256 x 150,000 x 4 bytes = 150 MB
_CONTEXT_STEP = 512
_CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
# n_gpu_layers, split_mode, load_mode (auto), lazy_mode (auto), main_gpu; behind pointers the flags vocab_only,
# check_tensors, use_extra_bufts, no_host, no_alloc
_MODEL_DEFAULTS = {16: struct.pack("<5i", -1, 1, -1, 1, 0), 72: bytes((0, 0, 1, 0, 0))}
_NO_VALUES = {24: bytes(8), 76: b"\1"}  # into no memory, by none of the ways of a file

_int32_p = ctypes.POINTER(ctypes.c_int32)
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class LibraryUnusable(Exception):  # noqa: N818  not an error: the caller has another way
    """The wheel's library lacks a function, or a structure is not laid out as expected."""


class _Parameters(ctypes.Structure):
    """A parameter structure as llama.cpp fills it: larger than any of them, passed on by value."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """`struct llama_batch` of llama.h."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", _int32_p),
        ("embd", ctypes.c_void_p),
        ("pos", _int32_p),
        ("n_seq_id", _int32_p),
        ("seq_id", ctypes.POINTER(_int32_p)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_HANDLE, _INT, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p

# function -> (result, arguments), as in llama.h
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "llama_log_set": (None, [_LogCallback, _HANDLE]),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_HANDLE, [_TEXT, _Parameters]),
    "llama_model_free": (None, [_HANDLE]),
    "llama_init_from_model": (_HANDLE, [_HANDLE, _Parameters]),
    "llama_free": (None, [_HANDLE]),
    "llama_n_ctx": (ctypes.c_uint32, [_HANDLE]),
    "llama_set_n_threads": (None, [_HANDLE, _INT, _INT]),
    "llama_get_memory": (_HANDLE, [_HANDLE]),
    "llama_memory_clear": (None, [_HANDLE, _BOOL]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_INT, [_HANDLE, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_HANDLE, _INT]),
    "llama_model_get_vocab": (_HANDLE, [_HANDLE]),
    "llama_vocab_n_tokens": (_INT, [_HANDLE]),
    "llama_vocab_is_eog": (_BOOL, [_HANDLE, _INT]),
    "llama_tokenize": (_INT, [_HANDLE, _TEXT, _INT, _int32_p, _INT, _BOOL, _BOOL]),
    "ggml_op_name": (_TEXT, [ctypes.c_int]),
    "ggml_nbytes": (ctypes.c_size_t, [_HANDLE]),
    "ggml_backend_tensor_get": (None, [_HANDLE, _HANDLE, ctypes.c_size_t, ctypes.c_size_t]),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The wheel's library, its functions declared.

    Raises:
        LibraryUnusable: one is missing, or a structure is laid out otherwise.
    """
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise LibraryUnusable("xllamacpp has no extension module")
    try:
        found = ctypes.CDLL(spec.origin)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise LibraryUnusable(str(error)) from error
    _check_layouts(found)
    return found


def _check_layouts(library: ctypes.CDLL) -> None:
    found = tuple(library.llama_context_default_params().words[:4])
    if found != _CONTEXT_DEFAULTS:
        raise LibraryUnusable(f"context parameters start with {found}, not {_CONTEXT_DEFAULTS}")
    batch = library.llama_batch_init(4, 0, 1)
    filled = [bool(batch.token), bool(batch.pos), bool(batch.n_seq_id), bool(batch.seq_id), bool(batch.logits)]
    if not all(filled) or batch.embd or batch.n_tokens != 0:
        raise LibraryUnusable("struct llama_batch is laid out differently")
    library.llama_batch_free(batch)


def _without_values(library: ctypes.CDLL) -> ctypes.Structure:
    """Parameters by which a model is made of the head of its file, and no value is read."""
    parameters: ctypes.Structure = library.llama_model_default_params()
    found = bytes(parameters)
    if any(found[place : place + len(values)] != values for place, values in _MODEL_DEFAULTS.items()):
        raise LibraryUnusable("struct llama_model_params is laid out differently")
    for place, values in _NO_VALUES.items():
        ctypes.memmove(ctypes.addressof(parameters) + place, values, len(values))
    return parameters


class LibraryEngine:
    """One model opened through the C interface.

    Args:
        adjust: changes the parameters of a context before it is made.
        quiet: leave out what llama.cpp tells on stderr.
        has_values: whether the file holds more than its head; without, nothing can be computed.

    Raises:
        LibraryUnusable: the wheel's library is not the one this was written for.
        RunError: llama.cpp cannot load the file.
    """

    def __init__(
        self,
        gguf_file: Path,
        threads: int,
        *,
        adjust: "Callable[[ctypes.Structure], None] | None" = None,
        quiet: bool = True,
        has_values: bool = True,
    ) -> None:
        self._lib = library()
        # A C function that does nothing with a number stands in for a silent log: one written in Python would wait for
        # the interpreter lock in llama.cpp's own threads, while the interpreter may be waiting for those threads.
        silent = ctypes.cast(ctypes.CDLL(None).abs, _LogCallback) if quiet else _LogCallback()
        self._lib.llama_log_set(silent, None)
        self._adjust = adjust
        self._threads = threads
        self._context: int | None = None
        self._capacity = 0
        parameters = self._lib.llama_model_default_params() if has_values else _without_values(self._lib)
        self._model = self._lib.llama_model_load_from_file(str(gguf_file).encode(), parameters)
        if not self._model:
            raise RunError(f"llama.cpp cannot load {gguf_file}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def close(self) -> None:
        """Free the context and the model."""
        self._free_context()
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def log_probabilities(self, token_ids: Sequence[int], positions: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Natural-log probabilities of the token after each position, float32 of shape [positions, vocabulary]."""
        import numpy as np

        self._start(len(token_ids))
        wanted = set(positions)
        rows = {position: _log_softmax(row) for position, row in self._logits(token_ids, wanted)}
        return np.stack([rows[position] for position in positions])

    def run(self, token_ids: Sequence[int]) -> None:
        """Compute all of a text's positions in every layer; what comes out is left."""
        self._start(len(token_ids))
        for start in range(0, len(token_ids), _TOKENS_PER_PASS):
            piece = token_ids[start : start + _TOKENS_PER_PASS]
            places = range(start, start + len(piece))
            # positions that nothing is asked of are left out of the last layer
            self._decode(piece, places, set(places))

    def prepare(self, tokens: int) -> None:
        """Lay out what a text of so many tokens is computed by, without computing it."""
        self._open_context(tokens)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """The greedy continuation without its stop token, and the seconds spent on it after the prompt."""
        begun = time.perf_counter()
        found: list[int] = []
        for token in self.stream(prompt_ids, max_new_tokens):
            if not found:  # the first token comes with the prompt's forward pass
                begun = time.perf_counter()
            found.append(token)
        return found, time.perf_counter() - begun

    def stream(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """The greedy continuation token by token, ended before the first stop token."""
        self._start(len(prompt_ids) + max_new_tokens)
        last = len(prompt_ids) - 1
        logits = next(row for _, row in self._logits(prompt_ids, {last}))
        for place in range(last + 1, last + 1 + max_new_tokens):
            token = int(logits.argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                return
            yield token
            logits = next(row for _, row in self._logits([token], {place}, first=place))

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """llama.cpp's own token ids of a text."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
        if count < 0:
            raise RunError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes")
        return list(ids[:count])

    def _start(self, tokens: int) -> None:
        if tokens > self._capacity:
            self._open_context(tokens)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _open_context(self, tokens: int) -> None:
        self._free_context()
        parameters = self._lib.llama_context_default_params()
        parameters.words[0] = -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        if self._adjust is not None:
            self._adjust(parameters)
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RunError(f"llama.cpp cannot make a context of {tokens} tokens")
        self._capacity = int(self._lib.llama_n_ctx(self._context))
        if self._capacity < tokens:
            raise RunError(f"llama.cpp made a context of {self._capacity} tokens where {tokens} were asked for")
        self._lib.llama_set_n_threads(self._context, self._threads, self._threads)

    def _free_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context, self._capacity = None, 0

    def _logits(
        self, token_ids: Sequence[int], wanted: set[int], first: int = 0
    ) -> Iterator[tuple[int, "npt.NDArray[np.float32]"]]:
        """Position and logits of every wanted position; `first` is the position of the first token."""
        import numpy as np

        for start in range(0, len(token_ids), _TOKENS_PER_PASS):
            piece = token_ids[start : start + _TOKENS_PER_PASS]
            places = range(first + start, first + start + len(piece))
            self._decode(piece, places, wanted)
            for index, place in enumerate(places):
                if place in wanted:
                    pointer = self._lib.llama_get_logits_ith(self._context, index)
                    yield place, np.ctypeslib.as_array(pointer, (self.vocabulary_size,)).copy()

    def _decode(self, token_ids: Sequence[int], places: Sequence[int], wanted: set[int]) -> None:
        batch = self._lib.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for index, (token, place) in enumerate(zip(token_ids, places, strict=True)):
                batch.token[index], batch.pos[index] = token, place
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = place in wanted
            code = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise RunError(f"llama.cpp's decode failed with code {code}")


def _log_softmax(logits: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    result: npt.NDArray[np.float32] = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return result
