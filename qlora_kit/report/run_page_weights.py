"""What became of the learned update in each file: the merge base that was taken, and what rounding left of it."""

from collections.abc import Sequence

from qlora_kit.core.units import kept_share
from qlora_kit.report.page import text
from qlora_kit.report.run_page_facts import Artifact, Survival
from qlora_kit.report.run_page_fidelity import NONE, decimals


def merge_bases(exports: Sequence[Artifact]) -> str:
    """The held-out loss of each file by the base that it was made from; empty where no bases were compared."""
    compared = [one for one in exports if one.merge_bases]
    if not compared:
        return ""
    bases = list(dict.fromkeys(base for one in compared for base in one.merge_bases))
    heads = [f'<th class="number">{text(base)} <small>loss, nats</small></th>' for base in bases]
    rows = [[_loss_cell(one, base) for base in bases] for one in compared]
    note = (
        "With export.merge_base=measure a file is made from each base, and the one with the lowest held-out loss is "
        "kept. Dequantized: the base as it was trained on, written as 16 bit. Original: the 16-bit weights that it was "
        "quantized from."
    )
    return f'<div class="few">{_table(compared, heads, rows)}</div>\n<p class="note">{text(note)}</p>'


def _loss_cell(one: Artifact, base: str) -> str:
    loss = one.merge_bases.get(base)
    said = NONE if loss is None else text(decimals(4)(loss))
    return f"<b>{said}</b><small>taken</small>" if base == one.merge_base else said


def survival(exports: Sequence[Artifact]) -> str:
    """The share of the update that each file keeps, by kind of layer; empty where no file was read back."""
    measured = [(one, one.survival) for one in exports if one.survival is not None]
    if not measured:
        return ""
    kinds = list(dict.fromkeys(kind for _, found in measured for kind in found.kinds))
    heads = ["<th>verdict</th>", '<th class="number">all layers <small>least</small></th>']
    heads += [f'<th class="number">{text(kind)} <small>least</small></th>' for kind in kinds]
    rows = [[_badge(found), _kept(found.kept, found.worst_kept), *_of_kinds(found, kinds)] for _, found in measured]
    table = _table([one for one, _ in measured], heads, rows)
    return f'{table}\n{_warnings(measured)}<p class="note">{_explanation(exports)}</p>'


def _of_kinds(found: Survival, kinds: Sequence[str]) -> list[str]:
    return [_kept(*found.kinds[kind]) if kind in found.kinds else NONE for kind in kinds]


def _badge(found: Survival) -> str:
    if found.warning is None:
        return '<span class="badge unknown">not judged</span>'
    state, said = ("warned", "partly lost") if found.warning else ("kept", "kept")
    return f'<span class="badge {state}">{said}</span>'


def _kept(all_of_it: float | None, least: float | None) -> str:
    """A share, and below it that of the weight that kept the least."""
    if all_of_it is None:
        return NONE
    return f"{kept_share(all_of_it)}<small>{NONE if least is None else kept_share(least)}</small>"


def _warnings(measured: Sequence[tuple[Artifact, Survival]]) -> str:
    """What was said of each file, and the advice, which is mostly the same, once."""
    said, advice = [], dict[str, list[str]]()
    for one, found in measured:
        first, *lines = (found.warning or "").splitlines() or [""]
        said += [f'<p class="note"><b>{text(one.name)}: {text(first)}</b></p>'] if first else []
        if lines:
            advice.setdefault("\n".join(line.strip() for line in lines), []).append(one.name)
    told = [
        f'<p class="note">{text(", ".join(names))}:</p><pre class="advice">{text(lines)}</pre>'
        for lines, names in advice.items()
    ]
    return "".join([*said, *told])


def _explanation(exports: Sequence[Artifact]) -> str:
    said = [
        "The length of a file's own change to the weights along the change that was learned: 100% is all of it, 0% is "
        "the base again. Rounding adds noise, so a file may end up on the other side of the base (less than none) or "
        "beyond what was learned (more than all). Below a number: the weight of that kind that keeps the least."
    ]
    if others := [one.name for one in exports if one.survival is None]:
        said.append(f"Not measured for {', '.join(others)}.")
    return text(" ".join(said))


def _table(files: Sequence[Artifact], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A line a file; cells are HTML, and numbers but for a badge."""
    lines = [
        f"<tr><td><b>{text(one.name)}</b></td>{''.join(_cell(inner) for inner in cells)}</tr>"
        for one, cells in zip(files, rows, strict=True)
    ]
    head = f"<thead><tr><th>file</th>{''.join(heads)}</tr></thead>"
    body = f"<tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="fidelity">{head}{body}</table></div>'


def _cell(inner: str) -> str:
    return f"<td>{inner}</td>" if inner.startswith("<span") else f'<td class="number">{inner}</td>'
