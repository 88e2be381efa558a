"""Finds the folder of the base model that `model.source` names: the demo, a local folder or a hub repository."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import DamagedFileError, Problem, RecipeError
from qlora_kit.core.files import read_json, typed_path
from qlora_kit.core.shell import override, shell_line
from qlora_kit.families.demo import HUB_ID
from qlora_kit.model.demo import demo_base
from qlora_kit.model.kind import CONFIG, kind_problems, read_config
from qlora_kit.schema.model import ModelConfig
from qlora_kit.weights.headers import INDEX, listed_files

DEMO = "demo"
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/?$")  # as huggingface_hub lays out its cache
# Never *.bin, *.pt or *.py: a pickle or a script would run code of the repository's author.
TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
CONFIG_FILES = [CONFIG]
# README.md names the license.
HUB_FILES = ["*.safetensors", *TOKENIZER_FILES, "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]
# Second copies of the same weights.
HUB_COPIES = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
# Of files that lie beside weights.
_BESIDE = {"", ".json", ".jsonl", ".jinja", ".md", ".model", ".py", ".txt"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def hub_name(source: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """Repository and revision of a base that comes from the hub; None for a folder of the user's own.

    Args:
        source, revision: `model.source` and `model.revision`; a folder in the hub's cache is its repository, too.
    """
    if source == DEMO:
        return HUB_ID, None
    if cached := _CACHED.search(source):
        return f"{cached[1]}/{cached[2]}", cached[3]
    is_local = _looks_like_a_path(source) or typed_path(source).exists()
    return None if is_local else (source, revision)


def pinned(config: ModelConfig) -> ModelConfig:
    """The base with the commit of a hub repository that the recipe leaves open, which is the newest; told of once.

    What records the base records it, so that whatever comes later reads the same commit again. Where the hub cannot be
    reached, it is the commit that the local cache has.

    Raises:
        RecipeError: there is no such folder, or neither the hub nor the cache has the repository.
    """
    if not _is_on_hub(config) or config.revision:
        return config
    commit = _newest_commit(config.source)
    log.info(f"{config.source} at {commit}: its newest commit, for model.revision is not set; the run keeps it")
    return replace(config, revision=commit)


def locate_base(config: ModelConfig) -> Path:
    """The checked folder of the base model, fetched first where needed.

    Raises:
        RecipeError: there is no such folder, it lacks a file, it needs remote code, or the hub cannot serve it.
    """
    if config.source == DEMO:
        return demo_base()
    check_source(config)
    if not _is_on_hub(config):
        return typed_path(config.source)
    fetched = _fetch(pinned(config), HUB_FILES)
    check_folder(fetched)
    return fetched


def check_source(config: ModelConfig) -> None:
    """Check what is at hand of a base, and fetch nothing.

    Raises:
        RecipeError: there is no such folder, it lacks a file or needs remote code.
    """
    if config.source != DEMO and (folder := typed_path(config.source)).exists():
        check_folder(folder)
    else:
        _is_on_hub(config)


def refuse_other_kinds(config: ModelConfig) -> Path | None:
    """Refuse a model that is no text decoder by its config.json alone; of a hub repository nothing else is fetched.

    Returns:
        The folder of that file, where there is one.

    Raises:
        RecipeError: it has an encoder, or sizes that no model has.
        DamagedFileError: its config.json is no JSON object.
    """
    if config.source == DEMO:
        return None
    folder = typed_path(config.source)
    if not folder.is_dir():
        if _looks_like_a_path(config.source):
            return None  # locate_base says what is wrong with it
        folder = _fetch(pinned(config), CONFIG_FILES)
    if not (folder / CONFIG).is_file():
        return None
    if problems := list(kind_problems(config.source, read_config(folder))):
        raise RecipeError(problems)
    return folder


def locate_tokenizer(config: ModelConfig) -> Path:
    """A folder with the base's tokenizer and settings; of a hub repository no weight is fetched for it.

    Raises:
        RecipeError: there is no such folder, it has no tokenizer, or the hub cannot serve it.
    """
    folder = typed_path(config.source)
    if config.source != DEMO and folder.is_dir():
        if problem := _no_tokenizer(folder):
            raise RecipeError([problem])
        return folder
    return _fetch(pinned(config), TOKENIZER_FILES) if _is_on_hub(config) else locate_base(config)


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model that can be loaded safely: config, safetensors, tokenizer, no remote code.

    Raises:
        RecipeError: with one problem for each thing that is missing or refused.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{folder} is a file; model.source names the folder of a model",
            "model.source",
            shell_line([override("model.source", folder.parent)]),
        )
    problems = [*_config_problems(folder), *_weight_problems(folder)]
    if problem := _no_tokenizer(folder):
        problems.append(problem)
    if problems:
        raise RecipeError(problems)


def _no_tokenizer(folder: Path) -> Problem | None:
    if any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    what = f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)})"
    return Problem(what, "model.source", f"copy the model's tokenizer files into {folder}")


def _config_problems(folder: Path) -> list[Problem]:
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = f"{folder} holds an adapter, not a base model" if adapter else f"{folder} has no config.json"
        return [Problem(what, "model.source", "model.source=<folder of a model in Hugging Face format>")]
    try:
        config = read_json(path)
    except ValueError as error:
        return [Problem(f"{path} is not a JSON object: {error}", "model.source", "fetch or copy this file again")]
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return [Problem(f"{path} does not say its model_type", "model.source", "fetch or copy this file again")]
    if config.get("auto_map") and not _is_known(kind):
        what = f"{folder} needs code from its own repository (model_type '{kind}'), which the kit never runs"
        return [Problem(what, "model.source", "model.source=<a model whose type transformers knows>")]
    return []


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _weight_problems(folder: Path) -> list[Problem]:
    index = folder / INDEX
    if index.is_file():
        try:
            return _shard_problems(folder, sorted(set(listed_files(index).values())))
        except DamagedFileError as error:
            return list(error.problems)
    if any(folder.glob("*.safetensors")):
        return []
    pickles = sorted(entry.name for pattern in _PICKLES for entry in folder.glob(pattern))
    if pickles:
        what = f"{folder} has its weights only as pickle ({pickles[0]}), which can run code; the kit reads safetensors"
        return [Problem(what, "model.source", "convert them with transformers: model.save_pretrained(<folder>)")]
    other = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.suffix not in _BESIDE)
    what = f"{folder} has no *.safetensors" + (
        f", only {other[0]}; training starts from a safetensors model" if other else ""
    )
    return [Problem(what, "model.source", "model.source=<folder of a model in Hugging Face format>")]


def _shard_problems(folder: Path, shards: list[str]) -> list[Problem]:
    missing = [name for name in shards if not (folder / name).is_file()]
    if not missing:
        return []
    what = f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:5])}"
    return [Problem(what, "model.source", "fetch the missing files again")]


def _is_on_hub(config: ModelConfig) -> bool:
    """Whether a base is a repository of the hub.

    Raises:
        RecipeError: it reads like a path, and there is nothing.
    """
    folder = typed_path(config.source)
    if config.source == DEMO or folder.exists():
        return False
    if _looks_like_a_path(config.source):
        raise _no_such_folder(config.source, folder)
    return True


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or "\\" in source or source.endswith("/")


def _no_such_folder(source: str, folder: Path) -> RecipeError:
    near = _nearest(source, folder)
    what = f"no such folder: {source}" + (f"; did you mean '{near}'?" if near else "")
    other = "model.source=<a folder>, <owner>/<name> of a hub model, or demo"
    fix = shell_line([override("model.source", near)]) if near else other
    return RecipeError(what, where="model.source", fix=fix)


def _nearest(source: str, folder: Path) -> str | None:
    if difflib.get_close_matches(source, [DEMO], cutoff=0.6):
        return DEMO
    parent = folder.parent
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.6)
    return str(parent / close[0]) if close else None


def _fetch(config: ModelConfig, files: list[str]) -> Path:
    with _hub_errors(config.source, config.revision):
        return _snapshot(config.source, str(config.revision), files)


def _newest_commit(repository: str) -> str:
    """The commit that the main branch of a hub repository is at; of the cache where the hub cannot be reached."""
    import httpx  # comes with huggingface_hub
    from huggingface_hub import HfApi, errors, snapshot_download

    with _hub_errors(repository, None):
        try:
            commit = HfApi().model_info(repository).sha
        except (errors.GatedRepoError, errors.RepositoryNotFoundError):
            raise
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx.HTTPError, OSError):
            cached = Path(snapshot_download(repository, allow_patterns=CONFIG_FILES, local_files_only=True)).name
            log.warning(f"the hub cannot be reached: of {repository} the newest commit is taken that is in the cache")
            return cached
    if commit is None:
        raise RecipeError(f"the hub names no commit of {repository}", "model.source", "model.revision=<commit>")
    return commit


@contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of the hub's library into the kit's."""
    import httpx  # comes with huggingface_hub
    from huggingface_hub import errors

    local = "model.source=<folder of a model in Hugging Face format>"
    try:
        yield
    except errors.GatedRepoError as error:
        what = f"the hub wants you to accept the terms of {repository} first, and to log in"
        raise RecipeError(what, where="model.source", fix="hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        what = f"the hub has no repository {repository}, or it is private and you are not logged in"
        raise RecipeError(what, where="model.source", fix=local) from error
    except errors.RevisionNotFoundError as error:
        what = f"{repository} has no revision {revision}"
        raise RecipeError(what, where="model.revision", fix="model.revision=<commit>") from error
    except errors.HFValidationError as error:
        what = f"{repository} is neither a folder nor the name of a hub repository"
        raise RecipeError(what, where="model.source", fix=local) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        cached = f"{revision} is not" if revision else "no commit of it is"
        what = f"{repository} could not be fetched: the hub cannot be reached and {cached} in the local cache"
        raise RecipeError(what, where="model.source", fix=local) from error


def _snapshot(repository: str, revision: str, files: list[str]) -> Path:
    """The revision from the hub's cache, without a network, else from the hub.

    The hub's library calls a revision cached when any file of it is; a fetched tokenizer must not pass for a model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=files,
                ignore_patterns=HUB_COPIES,
                local_files_only=local_files_only,
            )
        )

    try:
        cached = download(local_files_only=True)
        is_whole = (cached / CONFIG).is_file() if files is CONFIG_FILES else not _weight_problems(cached)
        if files is TOKENIZER_FILES or is_whole:
            return cached
    except LocalEntryNotFoundError:
        pass
    what = {id(TOKENIZER_FILES): "tokenizer", id(CONFIG_FILES): "settings"}.get(id(files), "base model")
    log.info(f"{what}: fetching {repository} at {revision} from the hub")
    return download(local_files_only=False)
