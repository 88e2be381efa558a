"""The finding that no row is held out, so that nothing could tell how close an export is to the trained model."""

from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.tokens import TokenRows
from qlora_kit.schema.data import HOLD_OUT, DataConfig


def nothing_held_out(config: DataConfig, train: TokenRows) -> Finding | None:
    """A warning where a recipe holds nothing out; None where it does."""
    if config.holds_out:
        return None
    what = "no row is held out, by data.eval_share or data.eval_file, so an export of this run could not be measured"
    hashes = train.store.table.hashes[train.rows]
    # rows that all say the same are never split, so a share of them would leave none to train on
    fix = HOLD_OUT if (hashes != hashes[0]).any() else "data.eval_file=<other rows>"
    return Finding(Level.warning, "nothing_held_out", what, fix=fix)
