"""The process in which llama.cpp's converter runs: `python -m qlora_kit.formats.gguf.converter.child JOB RESULT`.

It stands alone so that what the converter imports, and what is added here to modules that it asks for more than they
have, ends with it.
"""

import enum
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from qlora_kit.core.extras import is_present
from qlora_kit.formats.gguf.converter.settings import completed, stored_name
from qlora_kit.formats.gguf.llama_library import LibraryEngine, LibraryUnusable
from qlora_kit.formats.gguf.pre_tokenizers import is_byte_level, known_split

_TRIED_TOKENS = 4
_EMBEDDING = "token_embd.weight"
_TABLE = "embed_tokens.weight"  # its name in the folder, of those that the converter cuts
_ENUMERATIONS = ("MODEL_ARCH", "MODEL_TENSOR", "VisionProjectorType")


def convert(job: dict[str, str]) -> None:
    """Write a folder's model in 16 or 32 bit.

    Args:
        job: `converter`: folder of the package; `model`: the folder; `architecture`: the converter's name of it;
            `kind`: BF16, F16 or F32; `out`: the file; `values`: empty where all is only planned, from the heads of the
            files, and the file gets a head alone.
    """
    import gguf

    _add_missing_names(gguf, Path(job["converter"]))
    package = _imported(Path(job["converter"]))
    folder = Path(job["model"])
    fields = completed(folder, package.ModelBase.load_hparams(folder, False))
    fields["architectures"] = [job["architecture"]]
    model_class = package.get_model_class(job["architecture"])
    # The converter's own command sets this on a class too: layers that predict further tokens are no part of what was
    # trained.
    package.ModelBase.no_mtp = True
    kinds = gguf.LlamaFileType
    kind = {"BF16": kinds.MOSTLY_BF16, "F16": kinds.MOSTLY_F16, "F32": kinds.ALL_F32}[job["kind"]]
    model = model_class(folder, kind, Path(job["out"]), hparams=fields, model_name="model")
    writing = getattr(model, "impl", model)  # some classes hand on to one of several
    writing.model_tensors = {stored_name(name): tensor for name, tensor in writing.model_tensors.items()}
    # The kit writes the vocabulary: the converter refuses tokenizers that it does not know by name.
    writing.set_vocab = partial(_finish, writing)
    if job["values"]:
        writing.write()
        _try(Path(job["out"]), has_values=True)
    else:
        writing.prepare_tensors()
        writing.prepare_metadata(vocab_only=False)
        head = Path(job["out"])
        _write_head(writing.gguf_writer, head)
        try:
            _try(head, has_values=False)
        finally:
            head.unlink()


def _write_head(writer: Any, out: Path) -> None:
    """Write what stands in front of the values; behind it is a hole of their size, which takes no room on a disk."""
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    sizes = [out.stat().st_size, *(tensor.nbytes for tensor in writer.tensors[0].values())]
    with out.open("r+b") as stream:
        stream.truncate(sum(writer.ggml_pad(size, writer.data_alignment) for size in sizes))


def _try(file: Path, *, has_values: bool) -> None:
    """Have llama.cpp compute a few tokens, or lay out what it would compute.

    Where it refuses a model its reason is in the log, and where it ends the process, that is this one.
    """
    if not is_present("xllamacpp"):
        return
    try:
        engine = LibraryEngine(file, 1, quiet=False, has_values=has_values)
    except LibraryUnusable:
        return
    if has_values:
        engine.run(range(_TRIED_TOKENS))
    else:
        engine.prepare(_TRIED_TOKENS)
    engine.close()


def _finish(model: Any) -> None:
    """What is left to do when all tensors are planned and none is written."""
    _keep_all_rows(model)
    _finish_keys(model)


def _keep_all_rows(model: Any) -> None:
    """Plan the token embedding again with all its rows, where the converter cut it to the tokens of the tokenizer.

    The model gives each row a probability, and the kit's vocabulary has an unused token for each that has no text.
    """
    import gguf

    tensors = model.gguf_writer.tensors[0]
    planned = tensors.get(_EMBEDDING)
    whole = next((gen() for name, gen in model.model_tensors.items() if name.endswith(_TABLE)), None)
    if planned is None or whole is None or planned.shape[0] >= whole.shape[0] or planned.shape[1] != whole.shape[1]:
        return
    values = gguf.quants.quantize(whole.float().numpy(), planned.dtype)
    del tensors[_EMBEDDING]
    model.gguf_writer.add_tensor(_EMBEDDING, values, raw_dtype=planned.dtype)


def _finish_keys(model: Any) -> None:
    """Say that there is no vocabulary, and what llama.cpp or the converter would else take for granted.

    llama.cpp computes without a vocabulary where it is told how many tokens there are, and caps logits at 30 in
    families that may have a cap unless it is told of none. The converter takes state-space hybrids for models whose
    attention does not rotate, and those of the same kind without a state space for models whose attention does, which
    config.json may say otherwise.
    """
    writer, fields = model.gguf_writer, model.hparams
    writer.add_tokenizer_model("none")
    if split := _split(model):
        writer.add_tokenizer_pre(split)
    tensors, keys = writer.tensors[0], writer.kv_data[0]
    if f"{writer.arch}.vocab_size" not in keys and _EMBEDDING in tensors:
        writer.add_vocab_size(tensors[_EMBEDDING].shape[0])
    has_no_cap = "final_logit_softcapping" in fields and not fields["final_logit_softcapping"]
    if has_no_cap and f"{writer.arch}.final_logit_softcapping" not in keys:
        writer.add_final_logit_softcapping(0.0)
    rotates = keys.get(f"{writer.arch}.rope.scaling.finetuned")
    if rotates is not None and "position_embedding_type" in fields:
        was, rotates.value = rotates.value, fields["position_embedding_type"] == "rope"
        if rotates.value and not was:  # the converter gave it no bound
            keys[f"{writer.arch}.context_length"].value = fields["max_position_embeddings"]


def _split(model: Any) -> str:
    """The converter's name of how the tokenizer splits text, which it tells by a few tokens, where the kit has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.dir_model, local_files_only=True)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        if not is_byte_level(content) or known_split(content) is not None:
            return ""
        return str(model.get_vocab_base_pre(tokenizer))
    except Exception:  # the kit's own reader says what is wrong with a tokenizer
        return ""


def _imported(folder: Path) -> ModuleType:
    """The package, under the name that its own modules import it by."""
    spec = importlib.util.spec_from_file_location(
        "conversion", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["conversion"] = module
    spec.loader.exec_module(module)
    return module


def _add_missing_names(gguf: ModuleType, folder: Path) -> None:
    """Give enumerations of gguf the names that the converter's modules mention and that the release has not.

    A module of the converter serves several families, and could not be imported for the one of them that is newer than
    the published gguf. Of that one nothing can be written: its new name is in none of gguf's tables.
    """
    texts = [path.read_text("utf-8") for path in folder.glob("*.py")]
    for name in _ENUMERATIONS:
        known: type[enum.Enum] = getattr(gguf, name)
        for mentioned in _mentioned(name, texts):
            if not hasattr(known, mentioned):
                setattr(known, mentioned, f"{name}.{mentioned}, which this gguf has not")


def _mentioned(enumeration: str, texts: Iterable[str]) -> set[str]:
    pattern = re.compile(rf"\b{enumeration}\.([A-Z][A-Z0-9_]*)")
    return {found for text in texts for found in pattern.findall(text)}


def _end_with_parent() -> None:
    """End with the process that began this one, whose pipe is this one's input: nobody would take what comes of it."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main(job_file: str, result_file: str) -> int:
    """Run a job; the result holds the error, if there is one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    job: dict[str, str] = json.loads(Path(job_file).read_text("utf-8"))
    result: dict[str, Any] = {}
    try:
        convert(job)
    except Exception as error:  # of a stranger's model anything may come
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    Path(result_file).write_text(json.dumps(result), "utf-8")
    return 1 if result else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
