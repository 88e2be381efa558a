"""Optional dependencies: imported when needed, and named with the pip line when missing."""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.shell import shell_line

DISTRIBUTION = "qlora-kit"

# module -> extra of this distribution that installs it; export formats name their own
EXTRA_OF_MODULE = {
    "lm_eval": "harness",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_submitit_launcher": "sweep",
    "hydra_plugins.hydra_optuna_sweeper": "sweep",
}


def is_present(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def missing_extra(module: str, needed_for: str, extra: str | None = None) -> RecipeError:
    """The error for an absent optional module, with the pip line that installs it.

    Args:
        extra: of this distribution, that installs it; None for the one in the table.
    """
    return RecipeError(
        f"{needed_for} needs the package '{module}', which is not installed",
        fix=install_line(extra or EXTRA_OF_MODULE[module]),
    )


def requirements() -> list[Requirement]:
    """What the installed distribution declares, extras included; empty when it is not installed."""
    try:
        return [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return []


def is_of_extra(requirement: Requirement, extra: str) -> bool:
    """Whether an extra asks for a requirement that the distribution alone does not ask for."""
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def install_line(extra: str) -> str:
    """The pip line that adds an extra to this installation, to paste into a shell in the working folder."""
    return install_from(extra, _checkout(Path(__file__).resolve().parents[2]), _origin())


def is_install_line(fix: str) -> bool:
    """Whether what mends a problem is such a line."""
    return fix.startswith("pip install ")


def install_from(extra: str, checkout: Path | None, origin: Mapping[str, Any]) -> str:
    """The pip line that adds an extra to what was installed from a place.

    Args:
        checkout: the folder that the package runs from, where that is one with a pyproject.toml.
        origin: what pip noted of where it installed from (direct_url.json, PEP 610); empty for an index.
    """
    if checkout is not None:
        return _from_folder(extra, checkout, ["-e"])
    url, named = str(origin.get("url", "")), f"{DISTRIBUTION}[{extra}]"
    if "dir_info" in origin and (folder := _checkout(Path(unquote(urlsplit(url).path)))):
        return _from_folder(extra, folder, [])
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return shell_line(["pip", "install", f"{named} @ {url}" if url else named])


def _from_folder(extra: str, folder: Path, options: list[str]) -> str:
    is_here = folder == Path.cwd().resolve()
    constraints = folder / "constraints.txt"
    pins = ["-c", constraints.name if is_here else constraints] if constraints.is_file() else []
    return shell_line(["pip", "install", *pins, *options, f"{'.' if is_here else folder}[{extra}]"])


def _checkout(folder: Path) -> Path | None:
    return folder if (folder / "pyproject.toml").is_file() else None


def _origin() -> Mapping[str, Any]:
    try:
        noted = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    return json.loads(noted) if noted else {}


def require(module: str, needed_for: str, extra: str | None = None) -> ModuleType:
    """Import an optional module.

    Args:
        extra: of this distribution, that installs it; None for the one in the table.

    Raises:
        RecipeError: it is not installed; the message holds the pip line.
    """
    if not is_present(module):
        raise missing_extra(module, needed_for, extra)
    return importlib.import_module(module)
