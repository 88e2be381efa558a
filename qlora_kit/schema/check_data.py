"""What the recipe group `data` may not say."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qlora_kit.core.files import typed_path
from qlora_kit.core.shell import hydra_value, shell_line
from qlora_kit.schema.data import AUTO, FIELDS, HOLD_OUT, HOLD_OUT_INSTEAD, ROLES, Batching, DataConfig, Task
from qlora_kit.schema.issue import Issue
from qlora_kit.schema.model import Attention
from qlora_kit.schema.root import TrainRecipe

HOME_COMMANDS = "home_commands"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHORTEST_ROW = 2  # tokens: one to predict from, one to predict


def check_data(recipe: TrainRecipe) -> Iterator[Issue]:
    """Rows that are not there, settings that contradict each other, and packing that cannot isolate."""
    yield from _sources(recipe.data)
    yield from _held_out(recipe)
    if not isinstance(recipe.data.max_tokens, int) and recipe.data.max_tokens != AUTO:
        what = f"data.max_tokens must be a number of tokens or {AUTO}, got {recipe.data.max_tokens}"
        yield Issue("data.max_tokens", what, "data.max_tokens=2048")
    elif isinstance(recipe.data.max_tokens, int) and recipe.data.max_tokens < SHORTEST_ROW:
        what = f"data.max_tokens must be at least {SHORTEST_ROW} tokens, got {recipe.data.max_tokens}"
        yield Issue("data.max_tokens", what, f"data.max_tokens={SHORTEST_ROW}")
    for mine, ours in recipe.data.roles.items():
        if ours not in ROLES:
            what = f"data.roles maps {mine} to {ours}, which is no role; there are {', '.join(ROLES)}"
            yield Issue("data.roles", what, shell_line([f"data.roles={hydra_value({mine: 'user'})}"]))
    for name in recipe.data.columns:
        if name not in FIELDS:
            what = f"data.columns names {name}, which is no field of ours; there are {', '.join(FIELDS)}"
            yield Issue("data.columns", what, "data.columns={prompt: <your column>}")
    if recipe.data.batching is Batching.packed and recipe.model.attention is Attention.eager:
        yield Issue(
            "model.attention",
            "eager attention cannot keep packed rows apart: it would build a mask of every token against every other",
            "model.attention=sdpa or data.batching=padded",
        )


def _sources(data: DataConfig) -> Iterator[Issue]:
    if data.train_file is None and not data.sources:
        yield Issue("data.train_file", "there are no training rows", "data.train_file=<a file of rows>")
    if data.train_file is not None and data.sources:
        what = "data.train_file and data.sources are both set; a run trains on one or the other"
        yield Issue("data.sources", what, "data.train_file=null")
    if data.train_rows is not None and data.sources:
        what = "data.train_rows counts the rows of data.train_file; a mix has a count for each source"
        yield Issue("data.train_rows", what, "data.sources.<name>.rows=<count>")
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    for name, source in data.sources.items():
        path = f"data.sources.{name}"
        if source.weight is not None and source.rows is not None:
            what = f"{path} has both a weight and a number of rows; a source has one of them"
            yield Issue(f"{path}.rows", what, f"{path}.rows=null")
        if weighted and source.weight is None:
            what = f"{path} has no weight, but {', '.join(weighted)} has; give a weight to every source or to none"
            yield Issue(f"{path}.weight", what, f"{path}.weight=1")
        if source.revision is None:
            yield from missing_file(f"{path}.path", source.path)
    yield from missing_files(data)


def missing_files(data: DataConfig) -> Iterator[Issue]:
    """Files of rows that are not there; where the training rows lie elsewhere, held-out ones are a recipe's own."""
    yield from missing_file("data.train_file", data.train_file)
    for issue in missing_file("data.eval_file", data.eval_file):
        is_elsewhere = data.train_file is not None and Path(data.train_file).parent != Path(data.eval_file or "").parent
        yield replace(issue, fix=HOLD_OUT_INSTEAD) if is_elsewhere else issue


def missing_file(path: str, name: str | None) -> Iterator[Issue]:
    """A file of rows that is not there, `path` being the field that names it."""
    if name is None or os.path.exists(typed_path(name)):  # noqa: PTH110  Path.exists raises for a name that is too long
        return
    if glob.has_magic(name) and glob.glob(str(typed_path(name)), recursive=True):  # noqa: PTH207  Path.glob takes no absolute pattern
        return
    fix = f"{path}=<a file of rows>"
    if HOME_COMMANDS in Path(name).parts:
        fix = shell_line(["python", "-m", "qlora_kit.data.home_commands", "--out", Path(name).parent])
    elif HUB_ID.fullmatch(name) and path.endswith(".path"):
        fix = f"{path.removesuffix('.path')}.revision=<commit>, if {name} is a hub id"
    yield Issue(path, f"no such file: {name}", fix)


def _held_out(recipe: TrainRecipe) -> Iterator[Issue]:
    data = recipe.data
    if data.holds_out:
        return
    if data.task is not Task.none:
        yield Issue(
            "data.task",
            f"data.task={data.task.name} is set, but there are no held-out rows whose answers it could judge",
            HOLD_OUT,
        )
    if recipe.trainer.eval_every_steps is not None:
        yield Issue(
            "trainer.eval_every_steps",
            "trainer.eval_every_steps is set, but there are no held-out rows",
            HOLD_OUT,
        )
