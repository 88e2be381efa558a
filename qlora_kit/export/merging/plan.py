"""What the merged folder will hold, decided before a weight is read: each tensor, its source, and its file."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qlora_kit.adapter.expert_updates import StackFactors
from qlora_kit.adapter.updates import Adapter, LowRank
from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.rounded import stored_shape, weight_beside
from qlora_kit.export.merging.stacks import InStack, StackPartUpdate
from qlora_kit.export.merging.wide import WIDE, wide_tensors
from qlora_kit.weights.headers import BYTES, FLOATS, StoredTensor
from qlora_kit.weights.torch_rows import read_rows

if TYPE_CHECKING:
    from qlora_kit.model.expert_layout import StackLayout
    from qlora_kit.model.stored_names import StoredNames

SHARD_BYTES = 4_000_000_000
LARGEST_BASE_SHARD = 6_000_000_000  # bytes; a base that was sharded for its readers keeps its shards
SINGLE_FILE = "model.safetensors"
BLOCK = 1 << 21  # values that are read, merged and written at once


@dataclass(frozen=True)
class Piece:
    """One tensor of the merged model.

    Attributes:
        source: the base's tensor, or the one that the adapter saved in its place.
        file: the base's file that it comes from.
        dtype: safetensors type name as written; floats of the language model become BF16, but for `wide_tensors`.
        state: bitsandbytes' tensors beside it, where the base is stored in 4 or 8 bit.
        met_rounded: it was rounded in training.
        rounds: it is merged as rounded.
        flipped: it is a linear map that lies [inputs, outputs]; it was rounded the other way around.
        stack: its place in a stack of experts, which is rounded whole; None for any other.
    """

    name: str
    source: StoredTensor
    file: str
    shape: tuple[int, ...]
    dtype: str
    update: LowRank | StackPartUpdate | None = None
    state: Mapping[str, StoredTensor] = field(default_factory=dict)
    met_rounded: bool = False
    rounds: bool = False
    replaced: bool = False
    flipped: bool = False
    stack: InStack | None = None

    @property
    def size(self) -> int:
        """Bytes when written."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def whole(self) -> bool:
        """Whether it takes the whole tensor at once; else a few rows at a time."""
        return bool(self.state) or self.rounds or (self.update is not None and bool(self.update.init))

    @property
    def touched(self) -> bool:
        """Whether the adapter changes it."""
        return self.replaced or self.update is not None


@dataclass(frozen=True)
class Plan:
    """The merged model before it is written.

    Attributes:
        shards: the pieces of each file, in order, by file name.
        tied: whether the head is the embedding.
        untied: whether the base's config.json says so and the merged model's must not.
        vocabulary: rows of the embedding, where the adapter changed their number.
    """

    shards: Mapping[str, tuple[Piece, ...]]
    tied: bool
    untied: bool
    vocabulary: int | None

    @property
    def pieces(self) -> list[Piece]:
        """Those of all files, in order."""
        return [piece for shard in self.shards.values() for piece in shard]

    @property
    def wide(self) -> frozenset[str]:
        """Tensors that are written in fp32."""
        return frozenset(piece.name for piece in self.pieces if piece.dtype == WIDE)

    @property
    def size(self) -> int:
        """Bytes of all tensors when written."""
        return sum(piece.size for piece in self.pieces)


def make_plan(
    base: Mapping[str, StoredTensor],
    adapter: Adapter,
    tied: bool,
    rounded: Collection[str],
    merge_rounded: bool,
    names: "StoredNames",
) -> Plan:
    """Say what the merged folder holds.

    Args:
        base: the base's tensors.
        names: where the weights of the base's class lie among them.
        tied: what its config.json says of head and embedding.
        rounded: modules that were rounded in training.
        merge_rounded: whether those are merged as rounded.
    Raises:
        RunError: the adapter is not one of this base, or a rounded module is not in it.
    """
    layouts = names.stacks
    holders = {layout.holder for layout in layouts.values()}
    linear = [name for name in rounded if name not in holders]
    in_fp32 = wide_tensors(base, names)
    pieces = _base_pieces(base, _rounded_weights(base, linear, names), merge_rounded, names)
    pieces = {
        name: replace(piece, dtype="F32") if name in in_fp32 and not piece.rounds else piece
        for name, piece in pieces.items()
    }
    for layout in layouts.values():
        met = layout.holder in rounded
        pieces |= _in_stack(pieces, layout, met_rounded=met, rounds=met and merge_rounded)
    embedding, head = names.embedding, names.head
    shared = tied and bool(embedding and head)
    if shared and head not in pieces:
        pieces = _with_head(pieces, embedding, head)
    edited = _edited(pieces, adapter, names)
    edited |= _edited_stacks(edited, adapter, layouts)
    still_tied = shared and _same(pieces[embedding], pieces[head]) and _edited_alike(edited, embedding, head, adapter)
    rows = edited[embedding].shape[0] if embedding else 0
    grown = bool(embedding) and rows != pieces[embedding].shape[0]
    if still_tied:
        del edited[head]
    return Plan(_shards(edited.values()), still_tied, shared and not still_tied, rows if grown else None)


def _in_stack(
    pieces: Mapping[str, Piece], layout: "StackLayout", *, met_rounded: bool, rounds: bool
) -> dict[str, Piece]:
    """The pieces of a stack, each knowing its place."""
    sources = {part.tensor: pieces[part.tensor].source for part in layout.parts}
    return {
        part.tensor: replace(
            pieces[part.tensor], stack=InStack(layout, part, sources), met_rounded=met_rounded, rounds=rounds
        )
        for part in layout.parts
    }


def _edited_stacks(
    pieces: Mapping[str, Piece], adapter: Adapter, layouts: "Mapping[str, StackLayout]"
) -> dict[str, Piece]:
    """The pieces of the stacks that the adapter updates."""
    found: dict[str, Piece] = {}
    for factors in adapter.stacks.values():
        of_holder = [layout for layout in layouts.values() if layout.holder == factors.holder]
        if factors.followers >= len(of_holder):
            raise _foreign(adapter, f"it changes experts of {factors.holder}, which the base does not have")
        layout = of_holder[-1 - factors.followers]
        _check_factors(adapter, factors, layout)
        for part in layout.parts:
            piece = pieces[part.tensor]
            assert piece.stack is not None  # put there by `_in_stack`
            found[part.tensor] = replace(piece, update=StackPartUpdate(piece.stack, factors))
    return found


def _check_factors(adapter: Adapter, factors: StackFactors, layout: "StackLayout") -> None:
    experts, rows, columns = layout.shape
    outputs, inputs = (columns, rows) if layout.transposed else (rows, columns)
    if (factors.b.shape[0], factors.a.shape[1]) != (outputs, inputs) or factors.a.shape[0] % experts:
        shapes = f"{list(factors.b.shape)} and {list(factors.a.shape)}"
        raise _foreign(adapter, f"its factors of {layout.name} are {shapes}, and the base has {list(layout.shape)}")


def _rounded_weights(base: Mapping[str, StoredTensor], rounded: Collection[str], names: "StoredNames") -> set[str]:
    """The base's names of the weights that were rounded in training.

    Raises:
        RunError: one of them is not there, so that its update would be added to another weight than it was trained on.
    """
    wanted = [f"{module}.weight" for module in rounded]
    named = _stored(wanted, base, names)
    if missing := sorted(name for name in wanted if name not in named):
        what = (
            f"{len(missing)} of {len(wanted)} weights that were rounded in training are not in the base under their "
            f"names, such as {missing[0]}, so the merge cannot round them again"
        )
        raise RunError(what, fix="export.merge_base=original")
    return set(named.values())


def _stored(wanted: Iterable[str], stored: Collection[str], names: "StoredNames") -> dict[str, str]:
    """The base's name of each weight that it has."""
    named = {name: names.by_own.get(name, name) for name in wanted}
    return {name: found for name, found in named.items() if found in stored}


def _base_pieces(
    base: Mapping[str, StoredTensor], rounded: Collection[str], merge_rounded: bool, names: "StoredNames"
) -> dict[str, Piece]:
    state: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in base.items():
        weight = weight_beside(name)
        if weight in base:
            state.setdefault(str(weight), {})[name] = tensor
    beside = {name for found in state.values() for name in found}
    return {
        name: _unchanged(tensor)
        if name in names.outside and name not in state
        else _base_piece(
            tensor,
            state.get(name, {}),
            rounded=name in rounded,
            merge_rounded=merge_rounded,
            flipped=name in names.flipped,
        )
        for name, tensor in base.items()
        if name not in beside
    }


def _unchanged(tensor: StoredTensor) -> Piece:
    """A tensor of a tower, bit for bit."""
    return Piece(tensor.name, tensor, tensor.file.name, tensor.shape, tensor.dtype)


def _base_piece(
    tensor: StoredTensor, state: Mapping[str, StoredTensor], *, rounded: bool, merge_rounded: bool, flipped: bool
) -> Piece:
    return Piece(
        name=tensor.name,
        source=tensor,
        file=tensor.file.name,
        shape=stored_shape(tensor, state) if state else tensor.shape,
        dtype="BF16" if state or tensor.dtype in FLOATS else tensor.dtype,
        state=state,
        met_rounded=rounded,
        rounds=rounded and merge_rounded,
        flipped=flipped,
    )


def _with_head(pieces: Mapping[str, Piece], embedding: str, head: str) -> dict[str, Piece]:
    """The pieces with a head of the embedding's values, right behind it."""
    found = {}
    for name, piece in pieces.items():
        found[name] = piece
        if name == embedding:
            found[head] = replace(piece, name=head)
    return found


def _edited(pieces: Mapping[str, Piece], adapter: Adapter, names: "StoredNames") -> dict[str, Piece]:
    edited = dict(pieces)
    named = _named(pieces, adapter, names)
    for name, saved in adapter.replaced.items():
        piece = pieces[named[name]]
        free = 1 if piece.name in (names.embedding, names.head) else 0  # tokens may have been added
        if saved.dtype not in FLOATS or saved.shape[free:] != piece.shape[free:]:
            raise _foreign(adapter, f"its {name} is {list(saved.shape)} where the base's is {list(piece.shape)}")
        edited[piece.name] = Piece(piece.name, saved, piece.file, saved.shape, "BF16", replaced=True)
    for module, trained in adapter.updates.items():
        piece = edited[named[f"{module}.weight"]]
        update = replace(trained, flipped=piece.flipped)
        if piece.shape != update.shape:
            raise _foreign(
                adapter,
                f"its update of {module} is {list(update.shape)} where the base's weight is {list(piece.shape)}",
            )
        edited[piece.name] = replace(piece, update=update, dtype="BF16")
    return edited


def _named(pieces: Mapping[str, Piece], adapter: Adapter, names: "StoredNames") -> dict[str, str]:
    """The base's name of each tensor that the adapter changes."""
    wanted = [*adapter.replaced, *(f"{module}.weight" for module in adapter.updates)]
    named = _stored(wanted, pieces, names)
    if missing := [name for name in wanted if name not in named]:
        raise _foreign(adapter, f"it changes {missing[0]}, which the base does not have")
    if len(set(named.values())) != len(set(wanted)):
        raise _foreign(adapter, "two of the tensors that it changes are one in the base")
    return named


def _foreign(adapter: Adapter, what: str) -> RunError:
    return RunError(f"the adapter does not fit this base: {what}", where=str(adapter.folder))


def _edited_alike(edited: Mapping[str, Piece], embedding: str, head: str, adapter: Adapter) -> bool:
    first, second = edited[embedding], edited[head]
    if not first.touched and not second.touched:
        return True
    if adapter.keeps_tie and first.touched:
        return True
    both_saved = first.replaced and second.replaced and first.update is None and second.update is None
    return both_saved and _same(first, second)


def _same(left: Piece, right: Piece) -> bool:
    import torch

    one, two = left.source, right.source
    if one == two:
        return True
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return all(
        torch.equal(read_rows(one, start, stop), read_rows(two, start, stop))
        for start, stop in row_spans(one.shape, 1 << 22)
    )


def block_spans(shape: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """The rows of each block that a tensor is read, merged and written in."""
    return row_spans(shape, BLOCK)


def row_spans(shape: tuple[int, ...], values: int) -> Iterable[tuple[int, int]]:
    """Spans of rows with about this many values each; a scalar is one row."""
    rows = shape[0] if shape else 1
    step = max(1, values // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _shards(pieces: Iterable[Piece]) -> dict[str, tuple[Piece, ...]]:
    """The base's own files where they are of a size that readers expect, else files of at most SHARD_BYTES."""
    by_file: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, []).append(piece)
    if max(sum(piece.size for piece in shard) for shard in by_file.values()) <= LARGEST_BASE_SHARD:
        return {name: tuple(shard) for name, shard in sorted(by_file.items())}
    shards: list[list[Piece]] = [[]]
    for name in sorted(by_file):
        for piece in by_file[name]:
            if shards[-1] and sum(other.size for other in shards[-1]) + piece.size > SHARD_BYTES:
                shards.append([])
            shards[-1].append(piece)
    if len(shards) == 1:
        return {SINGLE_FILE: tuple(shards[0])}
    return {f"model-{place:05d}-of-{len(shards):05d}.safetensors": tuple(s) for place, s in enumerate(shards, 1)}
