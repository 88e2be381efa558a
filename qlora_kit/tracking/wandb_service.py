"""Weights & Biases."""

import netrc
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.extras import require
from qlora_kit.core.secrets import masked
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.tracking.parameters import nested
from qlora_kit.tracking.service import Ending, Recorded, is_online, say_offline

SECONDS_TO_ANSWER = 10


class WandbService:
    """One W&B run; offline when there is no key, never a prompt."""

    rewinds = False

    def __init__(self, config: TrackerConfig, run: Recorded) -> None:
        wandb = require("wandb", "tracker=wandb")
        self._is_online = is_online(config, _has_key())
        if not self._is_online:
            say_offline(config, "wandb")
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=60,
            # W&B notes the command line
            x_disable_meta=masked(" ".join(sys.argv)) != " ".join(sys.argv),
        )
        self._run = wandb.init(
            project=config.project,
            name=run.name,
            dir=str(run.folder),
            id=run.id or None,
            resume="allow" if run.id and self._is_online else None,
            config=nested(run.parameters),
            mode="online" if self._is_online else "offline",
            reinit="create_new",  # the run is ours: TRL asks the process's own one for its page, offline too
            settings=settings,
        )
        self.id = str(self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        # A server drops what comes below the last step that it has seen; plots go by the metric `step` anyway.
        own_step = {} if self._is_online else {"step": step}
        self._run.log({**metrics, "step": step}, **own_step)

    def finish(self, ending: Ending) -> None:
        """Mark the run as it ended and wait until everything is sent."""
        self._run.summary["ended"] = ending.value
        if ending is Ending.interrupted:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending is Ending.finished else 1)


def place(config: TrackerConfig) -> str:
    """Where runs go: a server's address, or empty for the run directory."""
    return _address() if is_online(config, _has_key()) else ""


def reach(address: str) -> None:
    """Ask the server for any answer.

    Raises:
        OSError: there is none.
        RecipeError: there is no key, which W&B would ask for at the terminal.
    """
    if not _has_key():
        what = "tracker.mode=online needs a key of Weights & Biases, and there is none"
        raise RecipeError(what, "the environment", "tracker.mode=offline")
    try:
        urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER).close()  # noqa: S310  # the user's own setting
    except urllib.error.HTTPError:
        return  # an answer


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(_address()).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
