"""What a recipe may not say about what it exports or scores: a trained run, or a base model."""

from collections.abc import Iterator
from dataclasses import replace

from qlora_kit.schema.check_data import check_data, missing_file
from qlora_kit.schema.data import AUTO, DataConfig
from qlora_kit.schema.export import MergeBase
from qlora_kit.schema.issue import Issue
from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe


def check_exported(recipe: ExportRecipe, data_option: str | None = None) -> list[Issue]:
    """Everything that does not go together.

    Args:
        data_option: the option of `data` that was chosen, if one was.
    """
    if recipe.base is None:
        own = replace(recipe.data, eval_file=None, eval_rows=None)
        return list(_of_run(recipe, data_option is not None or own != DataConfig(max_tokens=AUTO)))
    has_data = data_option is not None or recipe.data != DataConfig(max_tokens=AUTO)
    return list(_of_base(recipe, recipe.base, has_data))


def check_evaluated(recipe: EvalRecipe) -> list[Issue]:
    """Everything that does not go together in what is scored."""
    if recipe.base is None:
        return list(_later(recipe.data.eval_file, recipe.data.eval_rows))
    if recipe.data.eval_file is not None or recipe.data.eval_rows is not None:
        what = "data belongs to run=<run directory>; files of a base are scored on the rows of their export"
        return [Issue("data.eval_file", what, "leave data out, or export again with data.eval_file")]
    return [*_empty(recipe.base, "base=<folder of its exports>"), *_both(recipe.run, recipe.base, "one eval")]


def names_rows(data: DataConfig) -> bool:
    """Whether rows are named."""
    return data.train_file is not None or bool(data.sources)


def _of_run(recipe: ExportRecipe, has_data: bool) -> Iterator[Issue]:
    for path, is_set in (("revision", recipe.revision), ("out", recipe.out)):
        if is_set:
            what = f"{path} belongs to base=<folder>; a run has its own" + (" folder" if path == "out" else " base")
            yield Issue(path, what, f"{path}=null")
    if has_data:
        what = "data belongs to base=<folder>; a run has rows of its own, and takes data.eval_file alone"
        yield Issue("data", what, "leave data out, or base=<folder> instead of run")
    yield from _later(recipe.data.eval_file, recipe.data.eval_rows)


def _later(eval_file: str | None, eval_rows: int | None) -> Iterator[Issue]:
    yield from missing_file("data.eval_file", eval_file)
    if eval_file is None and eval_rows is not None:
        what = "data.eval_rows counts rows of data.eval_file, which is not set"
        yield Issue("data.eval_rows", what, "data.eval_file=<rows that were not trained on>")


def _of_base(recipe: ExportRecipe, base: str, has_data: bool) -> Iterator[Issue]:
    yield from _empty(base, "base=<folder of a model in Hugging Face format>")
    yield from _both(recipe.run, base, "one export")
    for name in recipe.export.adapter:
        what = f"{name} writes an adapter alone, and a base model has none"
        yield Issue("export", what, "export=gguf_q4_k_m, or run=<run directory> to export its adapter")
    if recipe.export.merge_base is MergeBase.best:
        what = "export.merge_base=best chooses what an adapter is merged into, and a base has no adapter"
        yield Issue("export.merge_base", what, "leave export.merge_base out")
    if has_data:
        # The rules of rows are those of training.
        yield from check_data(TrainRecipe(data=recipe.data))


def _empty(base: str, fix: str) -> Iterator[Issue]:
    if not base.strip():
        yield Issue("base", "base is empty", fix)


def _both(run: str | None, base: str, made: str) -> Iterator[Issue]:
    if run is not None:
        what = f"run={run} and base={base} are both set; {made} is of a trained run or of a base"
        yield Issue("base", what, f"run={run}, or base={base}, not both")
