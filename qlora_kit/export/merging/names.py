"""A model's names for its tensors, found among those of its checkpoint.

Checkpoints of models with a vision tower hold the layers of the text model under another prefix than it gives them.
"""

from collections import Counter
from collections.abc import Iterable

_LAYERS = "layers."


def checkpoint_names(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The checkpoint's name of each tensor that it has; the others are left out.

    A name counts as it is. Of the rest, all that share a prefix before the list of layers have the one other prefix
    under which the most of them lie; where two prefixes hold as many, none is taken.

    Args:
        wanted: names that the model gives to tensors.
        stored: those of the checkpoint.
    """
    there, wanted = set(stored), list(wanted)
    found = {name: name for name in wanted if name in there}
    others: dict[str, list[str]] = {}
    for name in wanted:
        if name not in found:
            others.setdefault(_parted(name)[0], []).append(name)
    if not others:
        return found
    prefixes: dict[str, list[str]] = {}
    for name in there:
        prefix, tail = _parted(name)
        if "vision" not in prefix:
            prefixes.setdefault(tail, []).append(prefix)
    for names in others.values():
        counts = Counter(prefix for name in names for prefix in prefixes.get(_parted(name)[1], ()))
        ranked = counts.most_common(2)
        if len(ranked) == 1 or (ranked and ranked[0][1] > ranked[1][1]):
            moved = {name: ranked[0][0] + _parted(name)[1] for name in names}
            found |= {name: other for name, other in moved.items() if other in there}
    return found


def _parted(name: str) -> tuple[str, str]:
    """What stands before the list of layers, or before the last module, and the rest."""
    start = 0 if name.startswith(_LAYERS) else name.find(f".{_LAYERS}") + 1
    if not start and not name.startswith(_LAYERS):
        start = len(name) - len(".".join(name.split(".")[-2:]))
    return name[:start], name[start:]
