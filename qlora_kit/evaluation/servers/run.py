"""Whether servers load an artifact and answer: tried in a child process where one is there, else checked statically."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.extras import is_present
from qlora_kit.data.template.ollama import MODELFILE
from qlora_kit.evaluation.servers.child import ANSWER_MARK
from qlora_kit.evaluation.servers.requirements import OLLAMA, SGLANG, VLLM

RAN, STATIC = "ran", "checked statically"
_MODULES = {VLLM: "vllm", SGLANG: "sglang"}
_START_SECONDS = 60
_TAIL = 5  # lines of a failed child's output that are shown
_MODEL = "qlora-kit-contract"


@dataclass(frozen=True)
class ServerCheck:
    """One server and one artifact.

    Attributes:
        how: `ran` or `checked statically`.
        problems: why the server would not serve it; empty where it does, or where nothing was found.
        why: for a static check, why the server was not run.
        answer: what it generated.
    """

    server: str
    how: str
    problems: tuple[str, ...] = ()
    why: str = ""
    answer: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing was found against it."""
        return not self.problems

    def __str__(self) -> str:
        reason = f" ({self.why})" if self.why else ""
        return f"{self.server}: {self.how}{reason}: {'; '.join(self.problems) or 'passed'}"


def try_servers(
    servers: Sequence[str],
    folder: Path,
    refused: Callable[[str], Iterable[str]],
    *,
    needs_base: bool = False,
    timeout: float = 600.0,
) -> list[ServerCheck]:
    """Try servers on an artifact, each for its own time.

    Args:
        servers: `VLLM`, `SGLANG` or `OLLAMA`.
        folder: the artifact's.
        refused: what a server would refuse in the artifact's files; it is run only if that is nothing.
        needs_base: whether the artifact is served on top of its base, which is not here.
        timeout: seconds that one server may take.
    """
    checks = []
    for server in servers:
        problems = tuple(refused(server))
        why = "its own files are wrong" if problems else _why_not_run(server, needs_base)
        if why:
            checks.append(ServerCheck(server, STATIC, problems, why))
            continue
        began = time.perf_counter()
        answer, failed = _tried(server, folder, timeout)
        seconds = round(time.perf_counter() - began, 1)
        checks.append(ServerCheck(server, RAN, (failed,) if failed else (), answer=answer, seconds=seconds))
    return checks


def _why_not_run(server: str, needs_base: bool) -> str:
    if server == OLLAMA:
        return "" if shutil.which("ollama") else "ollama is not on this machine"
    if not is_present(_MODULES[server]):
        return f"{_MODULES[server]} is not installed"
    if needs_base:
        return "an adapter is served on top of its base"
    import torch

    return "" if torch.cuda.is_available() else "this machine has no GPU"


def _tried(server: str, folder: Path, timeout: float) -> tuple[str, str]:
    """The answer, or why there is none."""
    try:
        if server == OLLAMA:
            return _ollama(folder, timeout), ""
        return _python_server(_MODULES[server], folder, timeout), ""
    except subprocess.TimeoutExpired:
        return "", f"no answer within {timeout:.0f} s"
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        return "", str(error)


def _python_server(module: str, folder: Path, timeout: float) -> str:
    line = [sys.executable, "-m", "qlora_kit.evaluation.servers.child", module, str(folder.resolve())]
    output = _run(line, dict(os.environ), timeout)
    marked = [line for line in output.splitlines() if line.startswith(ANSWER_MARK)]  # servers print on their way out
    if not marked:
        raise RuntimeError(f"{module} printed no answer: {_tail(output)}")
    return str(json.loads(marked[-1].removeprefix(ANSWER_MARK)))


def _run(line: list[str], environment: Mapping[str, str], timeout: float, cwd: Path | None = None) -> str:
    """The output of a command, whose whole group of processes ends with it.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
        subprocess.TimeoutExpired: it took too long and was ended.
    """
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        line, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd, start_new_session=True
    )
    try:
        output, errors = child.communicate(timeout=timeout)
    finally:
        _end_group(child)
    if child.returncode != 0:
        raise RuntimeError(f"{line[0]} ended with {child.returncode}: {_tail(errors or output)}")
    return output


def _end_group(child: "subprocess.Popen[str]") -> None:
    # servers start workers of their own, which outlive a parent that is ended alone
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _tail(text: str) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-_TAIL:])


def _ollama(folder: Path, timeout: float) -> str:
    with tempfile.TemporaryDirectory(prefix="qlora_kit_ollama_") as models, _ollama_server(Path(models)) as host:
        environment = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": models}
        _run(["ollama", "create", _MODEL, "-f", MODELFILE], environment, timeout, folder)
        asked = {
            "model": _MODEL,
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": False,
            "options": {"num_predict": 8, "temperature": 0},
        }
        answer = _post(f"http://{host}/api/chat", asked, timeout)
        return str(answer["message"]["content"])


@contextmanager
def _ollama_server(models: Path) -> Iterator[str]:
    """A server of our own on a free port, so that the user's models and server are left alone."""
    host = f"127.0.0.1:{_free_port()}"
    log = models / "serve.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            ["ollama", "serve"],  # noqa: S607  # the one on the PATH, as the user starts it
            env={**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str(models)},
            stdout=stream,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
        try:
            _wait_for(host, server, log)
            yield host
        finally:
            _end_group(server)


def _wait_for(host: str, server: "subprocess.Popen[str]", log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            _opener().open(f"http://{host}/api/version", timeout=2).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"ollama serve did not start: {_tail(log.read_text(encoding='utf-8', errors='replace'))}")


def _post(address: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data=data, headers=headers)  # noqa: S310  # a server that the kit started
    try:
        with _opener().open(request, timeout=timeout) as answer:
            content: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(
            f"{address} answered {error.code}: {_tail(error.read().decode(errors='replace'))}"
        ) from error
    return content


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the address is this machine's own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
