"""Reads a directory for its page: every file may be missing, half a run's, or of an older version."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, size_on_disk
from qlora_kit.core.overrides import read_overrides
from qlora_kit.report.run_page_artifacts import TRAINED, exported, samples_of, trained
from qlora_kit.report.run_page_facts import Artifact, Environment, Missing, RunPage, Source, Split, Untrained
from qlora_kit.report.run_page_missing import what_is_missing
from qlora_kit.report.run_page_records import as_record, as_records, numbers_of, texts_of, whole_of
from qlora_kit.runs.directory import MANIFEST, RunDirectory
from qlora_kit.schema.compose import load_recipe
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.root import ExportRecipe, TrainRecipe
from qlora_kit.tracking.tracker import read_metrics

STAMP = re.compile(r"(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)-(\d\d)")
BASE_SPLITS = {"training": "to calibrate on"}  # what a split of a recipe is for, where nothing is trained


@dataclass
class _Reader:
    """Files of a run, and notes about those that cannot be read."""

    run: RunDirectory
    notes: list[Missing] = field(default_factory=list)

    def json(self, path: Path) -> Mapping[str, Any]:
        """A JSON object, empty where there is no file; one that is damaged is noted."""
        if not path.is_file():
            return {}
        try:
            return read_json(path)
        except RecipeError:
            self.notes.append(Missing(f"{path.relative_to(self.run.path)} cannot be read: it holds no JSON object"))
            return {}

    def text(self, path: Path) -> str:
        """A text file, empty where there is none."""
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def recipe(self, verb: str, path: Path) -> Sealed | None:
        """The recipe of a verb; one that is no YAML or does not fit the schema is noted."""
        try:
            return load_recipe(verb, path)
        except RecipeError as error:
            what = str(error).splitlines()[0]
            self.notes.append(Missing(f"the recipe cannot be read by this version of qlora-kit: {what}"))
            return None


def read_run(run: RunDirectory) -> RunPage:
    """All that the page shows of a run, with a note for each thing that is not there; needs no weights and no torch."""
    reader = _Reader(run)
    recipe = cast(TrainRecipe | None, reader.recipe("train", run.recipe))
    metrics = [numbers for row in read_metrics(run.metrics) if "step" in (numbers := numbers_of(row))]
    evaluation, result = reader.json(run.evaluation), reader.json(run.result)
    page = RunPage(
        path=str(run.path),
        name=recipe.name if recipe else run.path.resolve().parent.name,
        started=_started(run),
        is_finished=run.is_finished,
        recipe=recipe,
        recipe_yaml=reader.text(run.recipe),
        overrides=read_overrides(run.overrides),
        environment=_environment(reader.json(run.environment)),
        metrics=metrics,
        result=numbers_of(result),
        splits=_splits(reader.json(run.data)),
        artifacts=_artifacts(reader, evaluation),
        samples=samples_of(evaluation),
        missing=(),
        optimizer=str(result.get("optimizer") or ""),
        warnings=texts_of(result, "warnings"),
        reach=texts_of(reader.json(run.reach), "lines"),
    )
    return replace(page, missing=(*what_is_missing(page), *reader.notes))


def read_exported_base(directory: RunDirectory) -> RunPage:
    """All that the page shows of a base's exports, as `read_run` of a run."""
    reader = _Reader(directory)
    recipe = cast(ExportRecipe | None, reader.recipe("export", directory.export_recipe))
    base = str(recipe.base or "") if recipe else ""
    data, evaluation = reader.json(directory.data), reader.json(directory.evaluation)
    splits = [replace(split, name=BASE_SPLITS.get(split.name, split.name)) for split in _splits(data)]
    page = RunPage(
        path=str(directory.path),
        name=base.rstrip("/").rpartition("/")[2] or directory.path.resolve().name,
        started=_started(directory),
        is_finished=True,
        recipe=None,
        recipe_yaml=reader.text(directory.export_recipe),
        overrides=read_overrides(directory.overrides),
        environment=_environment(reader.json(directory.environment)),
        metrics=(),
        result={},
        splits=splits,
        artifacts=_artifacts(reader, evaluation),
        samples=samples_of(evaluation),
        missing=(),
        untrained=Untrained(
            base=base,
            recipe=recipe,
            calibration=str(data.get("calibration") or ""),
            calibration_rows=whole_of(data, "rows"),
            scored_rows=whole_of(data, "scored"),
            row_tokens=whole_of(data, "tokens"),
        ),
    )
    return replace(page, missing=(*what_is_missing(page), *reader.notes))


def _started(run: RunDirectory) -> str:
    """Date and time by the directory's name, or empty."""
    stamp = STAMP.search(run.path.resolve().name)
    return f"{stamp[1]} {stamp[2]}:{stamp[3]}" if stamp else ""


def _environment(record: Mapping[str, Any]) -> Environment:
    packages = {str(name): str(version) for name, version in as_record(record.get("packages")).items()}
    gpus = record.get("gpus")
    return Environment(
        python=str(record.get("python") or ""),
        platform=str(record.get("platform") or ""),
        cpu_count=whole_of(record, "cpu_count"),
        gpus=[str(name) for name in gpus] if isinstance(gpus, list) else [],
        cuda=str(record.get("cuda") or ""),
        packages=packages,
    )


def _splits(data: Mapping[str, Any]) -> list[Split]:
    named = (("training", as_record(data.get("train"))), ("held out", as_record(data.get("held_out"))))
    return [_split(name, record) for name, record in named if record]


def _split(name: str, record: Mapping[str, Any]) -> Split:
    return Split(
        name=name,
        rows=whole_of(record, "rows"),
        tokens=whole_of(record, "tokens"),
        trained_tokens=whole_of(record, "trained_tokens"),
        longest_row=whole_of(record, "longest_row"),
        max_tokens=whole_of(record, "max_tokens"),
        long_rows={key: int(count) for key, count in numbers_of(record.get("long_rows")).items()},
        sources=[_source(name, source) for source in as_records(record.get("sources"))],
    )


def _source(split: str, record: Mapping[str, Any]) -> Source:
    return Source(
        split=split,
        name=str(record.get("name", "")),
        rows=whole_of(record, "rows"),
        tokens=whole_of(record, "tokens"),
        trained_tokens=whole_of(record, "trained_tokens"),
        skipped=whole_of(record, "bad_rows"),
        sha256={str(path): str(digest) for path, digest in as_record(record.get("sha256")).items()},
    )


def _artifacts(reader: _Reader, evaluation: Mapping[str, Any]) -> list[Artifact]:
    """Base and adapter as `eval` scored them, then every export that has a manifest, the 16-bit merge first."""
    scored = {str(row.get("name")): row for row in as_records(evaluation.get("rows"))}
    found = [trained(name, scored[name]) for name in TRAINED if name in scored]
    exports = []
    for path in sorted(reader.run.exports.glob(f"*/{MANIFEST}")):
        folder = path.parent
        if not folder.name.startswith(".") and (manifest := reader.json(path)):
            exports.append(exported(folder.name, size_on_disk(folder), manifest, scored.get(folder.name, {})))
    return found + sorted(exports, key=lambda export: (export.format != "merged", export.name))
