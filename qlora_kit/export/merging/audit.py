"""Checks of a merged folder as it lies on disk, before anybody loads it; each thing that is wrong has a name."""

from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import Problem, RunError
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted
from qlora_kit.export.merging.carry import carried, says_tied, vocabulary_size
from qlora_kit.export.merging.rounded import weight_beside
from qlora_kit.export.merging.write_shards import Written
from qlora_kit.weights.headers import FLOATS, StoredTensor, read_headers

if TYPE_CHECKING:
    from qlora_kit.model.stored_names import StoredNames

SHOWN = 5  # names in a message


def audit_changes(written: Iterable[Written], expected: Collection[str], optional: Collection[str]) -> None:
    """Check that the merge changed the tensors that the adapter changes, and no other.

    Args:
        expected: tensors with an update that is not zero.
        optional: tensors whose update is zero or that the adapter saved in full, which may be as before.
    Raises:
        RunError: the merge changed nothing, left out a tensor, or changed one that is not the adapter's.
    """
    changed = {tensor.name for tensor in written if tensor.changed}
    left_out = set(expected) - changed
    surplus = changed - set(expected) - set(optional)
    fix = "train for longer or with a higher optim.learning_rate, or serve the adapter beside its base"
    if expected and left_out == set(expected):
        raise RunError(
            f"the merge changed nothing: after rounding to bfloat16, each of the {len(left_out)} adapted tensors "
            "is what it was in the base",
            fix=fix,
        )
    if left_out:
        raise RunError(
            f"the merge left {len(left_out)} of {len(expected)} adapted tensors unchanged: {_some(left_out)}"
        )
    if surplus:
        raise RunError(
            f"the merge changed {counted(len(surplus), 'tensor')} that the adapter does not touch: {_some(surplus)}"
        )


def changes_hash(written: Iterable[Written]) -> str:
    """SHA-256 over the names and checksums of the changed tensors, in hex."""
    lines = sorted(f"{tensor.name} {tensor.checksum:016x}\n" for tensor in written if tensor.changed)
    return sha256("".join(lines).encode()).hexdigest()


def audit_folder(
    folder: Path,
    base: Path,
    base_names: Collection[str],
    stored: "StoredNames",
    tokens: int | None = None,
    wide: Collection[str] = (),
) -> None:
    """Check a merged folder against its base: files, names of tensors, tie, vocabulary, files that are carried.

    Args:
        base_names: names of the base's tensors.
        stored: where the weights of the base's class lie among them.
        tokens: length of the tokenizer that is served with it.
        wide: tensors that stay in fp32.
    Raises:
        RunError: a file is truncated or missing, or one problem for each thing that does not fit.
    """
    tensors = read_headers(folder)
    problems = [
        *_names(tensors, base_names, stored, tied=says_tied(folder)),
        *_kinds({name: tensor for name, tensor in tensors.items() if name not in stored.outside}, wide),
        *_vocabulary(tensors, stored, vocabulary_size(read_json(folder / "config.json")), tokens),
        *(f"{path.name} of the base is missing" for path in carried(base) if not (folder / path.name).is_file()),
    ]
    if "quantization_config" in read_json(folder / "config.json"):
        problems.append("config.json says that these 16-bit weights are quantized")
    if problems:
        raise RunError([Problem(f"the merged model is wrong: {what}", where=str(folder)) for what in problems])


def _names(
    tensors: Mapping[str, StoredTensor], base_names: Iterable[str], stored: "StoredNames", *, tied: bool
) -> Iterable[str]:
    expected = {name for name in base_names if weight_beside(name) is None}
    heads, embedded = {stored.head}, bool(stored.embedding and stored.head)
    missing, unexpected = expected - set(tensors) - heads, set(tensors) - expected - heads
    if missing:
        yield f"{counted(len(missing), 'tensor is', 'tensors are')} missing: {_some(missing)}"
    if unexpected:
        yield f"{counted(len(unexpected), 'tensor is', 'tensors are')} unexpected: {_some(unexpected)}"
    if tied and embedded and stored.head in tensors:
        yield f"the head is untied: config.json says tie_word_embeddings, but {stored.head} is stored too"
    if not tied and embedded and stored.head not in tensors:
        yield f"the head is missing: config.json says that it is not tied, and no {stored.head} is stored"


def _kinds(tensors: Mapping[str, StoredTensor], wide: Collection[str]) -> Iterable[str]:
    for kind, words, names in (("F32", "float32", set(wide)), ("BF16", "bfloat16", set(tensors) - set(wide))):
        found = {name: tensors[name].dtype for name in names if name in tensors}
        if other := {name for name, dtype in found.items() if dtype in FLOATS and dtype != kind}:
            yield f"{counted(len(other), 'tensor is', 'tensors are')} not {words}: {_some(other)}"


def _vocabulary(
    tensors: Mapping[str, StoredTensor], stored: "StoredNames", rows: int | None, tokens: int | None
) -> Iterable[str]:
    tables = {name: tensors[name].rows for name in (stored.embedding, stored.head) if name in tensors}
    for name, found in tables.items():
        if rows is not None and found != rows:
            yield f"{name} has {found} rows, and config.json says vocab_size={rows}"
        elif tokens is not None and tokens > found:
            yield f"the tokenizer has {tokens} tokens, and {name} has {found} rows"


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")
