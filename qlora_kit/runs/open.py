"""Opens what verbs work on: a finished run, a base to export, or the exports of a base; loads no weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_kit.adapter.strange import refuse_strange_adapter
from qlora_kit.core.environment import capture_environment
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json, typed_path, write_json, write_text
from qlora_kit.core.lock import BusyError
from qlora_kit.core.overrides import write_overrides
from qlora_kit.core.shell import override, shell_line
from qlora_kit.data.audit.embedding import beyond_embedding
from qlora_kit.data.audit.finding import Level
from qlora_kit.model.sizes import embedding_rows
from qlora_kit.model.source import locate_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.as_written import refuse_edited
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory, find_run, make_run_folder, no_empty_folder_left, refuse_at_work
from qlora_kit.runs.exported_base import find_exported_base, no_run_but_exports
from qlora_kit.runs.left_overs import clear_copies, clear_killed
from qlora_kit.runs.named_base import NamedBase, in_words_of_base, named_base
from qlora_kit.runs.run import Run
from qlora_kit.runs.same_base import refuse_other_base
from qlora_kit.schema.compose import load_recipe, recipe_yaml
from qlora_kit.schema.data import LaterRows
from qlora_kit.schema.root import ExportRecipe


def open_run(name: str, later: LaterRows | None = None) -> Run:
    """Open a finished run by path, or the newest one by `latest`; loads no weight.

    Args:
        later: held-out rows that are given now.
    Raises:
        DamagedFileError: its adapter is not one that the kit could have trained.
    """
    directory = find_run(name, finished=True)
    refuse_edited(directory)
    recipe = load_recipe("train", directory.recipe)
    base_folder = locate_base(recipe.model)
    refuse_other_base(directory, base_folder, is_trained=True)
    refuse_strange_adapter(directory.adapter, base_folder)
    base = Base.of(recipe.model, base_folder)
    return Run(directory, recipe, base, load_tokenizer(directory.adapter), later or LaterRows())


def open_idle_run(name: str, later: LaterRows | None = None) -> Run:
    """A finished run by path, or the newest one by `latest`; loads no weight.

    Args:
        later: held-out rows that are given now, instead of the run's own.

    Raises:
        RecipeError: there is none.
    """
    try:
        found = find_run(name, finished=True)
        refuse_at_work(found)
    except RecipeError as error:
        if name == "latest" and not isinstance(error, BusyError):
            raise no_run_but_exports(error) from error
        raise
    return open_run(str(found.path), later)


def open_to_export(recipe: ExportRecipe, overrides: Sequence[str], check: Callable[[Path], object]) -> Run:
    """The finished run, or the base, that an export recipe names; loads no weight.

    Args:
        overrides: the command line's words, for the record.
        check: of the base's folder, before anything else of the run is read; raises where the line does not fit it.

    Raises:
        RecipeError: there is none, or it cannot be exported.
    """
    if recipe.base is not None:
        recipe = _at_noted_commit(recipe)
        named = named_base(recipe)
        check(named.folder)
        return open_base(replace(recipe, revision=named.model.revision), named, overrides)
    found = find_run("latest" if recipe.run is None else recipe.run, finished=True)
    refuse_at_work(found)
    check(locate_base(load_recipe("train", found.recipe).model))
    return open_run(str(found.path), LaterRows(eval_file=recipe.data.eval_file, eval_rows=recipe.data.eval_rows))


def open_exports(name: str) -> Run:
    """Exports of a base by their folder, by the base's name, or the newest ones by `latest`; loads no weight.

    Raises:
        RecipeError: there are none, or the base is not where it was.
    """
    directory = find_exported_base(name)
    if not directory.has_exports:
        what = f"{directory.path} holds no finished export that could be scored"
        out = shell_line([override("out", directory.path)])
        raise RecipeError(what, f"base={name}", f"qlora-kit export base=<model> {out} export=gguf_q4_k_m")
    recipe = load_recipe("export", directory.export_recipe)
    try:
        return base_in(directory, recipe, named_base(recipe))
    except RecipeError as error:
        # The base is named there, not on this command line.
        place = str(directory.export_recipe)
        problems = [Problem(problem.what, f"{problem.where} in {place}", problem.fix) for problem in error.problems]
        raise RecipeError(problems) from error


def open_base(recipe: ExportRecipe, named: NamedBase, overrides: Sequence[str] = ()) -> Run:
    """A located base as something to export; loads no weight, and makes no more than the folder for it.

    Args:
        overrides: the command line's words, for the record.

    Raises:
        RecipeError: its tokenizer cannot be read, or `out` is another thing's folder.
    """
    name = Base.of(named.model, named.folder).shown.rpartition("/")[2]
    if recipe.out:
        directory = RunDirectory(typed_path(recipe.out))
        _refuse_taken(directory.path, recipe)
        return base_in(directory, recipe, named, overrides)
    path = make_run_folder(name)
    with no_empty_folder_left(path):
        return base_in(RunDirectory(path), recipe, named, overrides)


def base_in(directory: RunDirectory, recipe: ExportRecipe, named: NamedBase, overrides: Sequence[str] = ()) -> Run:
    """A located base whose files go to a directory, or are there already.

    Raises:
        RecipeError: transformers does not know its kind, or its tokenizer cannot be read.
    """
    base = Base.of(named.model, named.folder)
    _refuse_unknown(named.folder, recipe)
    with in_words_of_base(recipe):
        tokenizer = load_tokenizer(named.folder, named.model.chat_template)
    _refuse_beyond_embedding(named.folder, tokenizer, recipe)
    return Run(directory, recipe, base, tokenizer, overrides=tuple(overrides))


def note_export(run: Run, origin: Mapping[str, object]) -> None:
    """Write what is exported of a base alone, for the record; clear what killed exports left beside it.

    The recipe, the line, environment.json, data.json and tokenizer/.

    Args:
        origin: what the rows are and where they come from.

    Raises:
        RecipeError: exports of another base are there by now.
    """
    assert isinstance(run.recipe, ExportRecipe)
    _refuse_taken(run.directory.path, run.recipe)  # again: another export may have begun there since it was opened
    write_text(run.directory.export_recipe, recipe_yaml(run.recipe))
    write_overrides(run.directory.overrides, run.overrides)
    write_json(run.directory.environment, capture_environment())
    write_json(run.directory.data, dict(origin))
    # Not every file holds a tokenizer that transformers reads; `chat` turns token ids into text with this one.
    run.tokenizer.save_pretrained(run.directory.path / "tokenizer")
    clear_killed(run.directory.path)
    clear_copies(run.directory.exports)


def _refuse_unknown(folder: Path, recipe: ExportRecipe) -> None:
    """Refuse a kind of model that nothing could score, before a minute is spent on it."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        what = f"{folder} is a model of type '{kind}', which transformers {__version__} does not know"
        raise RecipeError(what, f"base={recipe.base}", "pip install --upgrade transformers, or base=<another model>")


def _refuse_beyond_embedding(folder: Path, tokenizer: Any, recipe: ExportRecipe) -> None:
    """Refuse a base whose answers, batches or prompts need tokens that it has no embedding for."""
    size = embedding_rows(read_json(folder / "config.json"))
    if size is None:
        return
    problems = [
        Problem(found.what, f"base={recipe.base}", found.fix)
        for found in beyond_embedding({}, tokenizer, size)
        if found.level is Level.error
    ]
    if problems:
        raise RecipeError(problems)


def _at_noted_commit(recipe: ExportRecipe) -> ExportRecipe:
    """A recipe with the commit that earlier exports into its folder are of, where it names none."""
    if recipe.revision is not None or not recipe.out:
        return recipe
    before = RunDirectory(typed_path(recipe.out)).export_recipe
    noted = load_recipe("export", before) if before.is_file() else None
    return recipe if noted is None or noted.base != recipe.base else replace(recipe, revision=noted.revision)


def _refuse_taken(path: Path, recipe: ExportRecipe) -> None:
    if path.exists() and not path.is_dir():
        fix = shell_line([override("out", f"{path}_exports")])
        raise RecipeError(f"{path} is a file, and out names a folder", f"out={recipe.out}", fix)
    if (path / "recipe.yaml").is_file():
        what = f"{path} is the directory of a training run"
        raise RecipeError(
            what,
            f"out={recipe.out}",
            f"{shell_line([override('run', path)])} to export that run, or out=<another folder>",
        )
    before = RunDirectory(path).export_recipe
    if before.is_file() and (other := load_recipe("export", before).base) != recipe.base:
        what = f"{path} holds exports of another base, {other}"
        raise RecipeError(what, f"out={recipe.out}", "out=<another folder>")
