"""What keeps a test apart from the tests around it: its draws, its environment, its folder, and no network."""

import gc
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy

SEED = 0
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "true",
    "WANDB_ERROR_REPORTING": "false",
}
MORE_MODULES = 200  # since libraries were set aside the last time
KEYS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class NetworkRefusedError(RuntimeError):
    """A test reached for another machine; no OSError, which libraries try again after."""


def go_offline() -> None:
    """This process and those that it starts know no hub and no key of a service."""
    os.environ.update(OFFLINE)
    for key in KEYS:
        os.environ.pop(key, None)


def draw_alike() -> None:
    """Generators that tests share start every test at the same number."""
    random.seed(SEED)
    numpy.random.seed(SEED)  # libraries draw from this one
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


class _SetAside:
    modules = 0


def set_libraries_aside() -> None:
    """Have full collections go over what tests make alone: over a library's million objects one takes half a second."""
    if len(sys.modules) >= _SetAside.modules + MORE_MODULES:
        _SetAside.modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@contextmanager
def as_before() -> Iterator[None]:
    """What the block does to environment variables and to the current folder is undone."""
    variables, folder = dict(os.environ), Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


def is_here(host: object) -> bool:
    """Whether a host, by name or number, is this machine."""
    if isinstance(host, bytes | bytearray):
        host = host.decode(errors="replace")
    if not isinstance(host, str) or host in ("", "localhost", socket.gethostname()):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        return address.is_loopback or address.is_unspecified
    return False


def refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: connections and names of other machines are refused, in forked processes too."""
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path is a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_here(host):
        test = os.environ.get("PYTEST_CURRENT_TEST", "a fixture")
        raise NetworkRefusedError(f"{test} reaches for {host!r}; tests use no network, only this machine")
