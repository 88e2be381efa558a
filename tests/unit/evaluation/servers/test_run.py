"""Servers on this machine are run in a child process, others are checked statically, and the result says which."""

import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qlora_kit.evaluation.servers import child, run
from qlora_kit.evaluation.servers.run import RAN, STATIC, ServerCheck
from qlora_kit.formats.servers import check_servers
from tests.tiny_models import build_tiny_model

# Speaks as much of Ollama as the check asks for.
FAKE_OLLAMA = """
import http.server, json, os, sys, time
host, models = os.environ["OLLAMA_HOST"], os.environ["OLLAMA_MODELS"]
made = os.path.join(models, "made")
if sys.argv[1] == "create":
    assert sys.argv[3:] == ["-f", "Modelfile"] and open("Modelfile").read().startswith("FROM ./m.gguf")
    {create}
    open(made, "w").write(sys.argv[2])
    sys.exit(0)
class Handler(http.server.BaseHTTPRequestHandler):
    def say(self, code, value):
        body = json.dumps(value).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.say(200, {{"version": "0"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == open(made).read() and asked["stream"] is False
        {answer}
    def log_message(self, *a):
        pass
open(os.environ["FAKE_PID"], "w").write(str(os.getpid()))
{serve}
name, port = host.split(":")
http.server.HTTPServer((name, int(port)), Handler).serve_forever()
"""
ANSWER = 'self.say(200, {"message": {"content": "Hello you"}})'


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    (folder / "Modelfile").write_text("FROM ./m.gguf\n")
    return folder


def install_ollama(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: str = "pass", answer: str = ANSWER, serve: str = "pass"
) -> Path:
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    text = FAKE_OLLAMA.format(create=create, answer=answer, serve=serve)
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    return tmp_path / "pid"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ollama_is_run_and_ended(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = install_ollama(tmp_path, monkeypatch)
    (check,) = check_servers("gguf", gguf, "m.gguf", timeout=30)
    assert (check.server, check.how, check.problems, check.answer) == ("Ollama", RAN, (), "Hello you")
    assert check.is_good and check.seconds > 0
    assert str(check) == "Ollama: ran: passed"
    assert not is_running(int(pid.read_text()))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"create": 'sys.exit("no such architecture")'}, "no such architecture"),
        ({"answer": 'self.say(500, {"error": "out of memory"})'}, "out of memory"),
        ({"serve": 'sys.exit("port taken")'}, "ollama serve did not start: port taken"),
        pytest.param({"create": "time.sleep(60)"}, "no answer within 2 s", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_in_ollama_is_told(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str], words: str
) -> None:
    pid = install_ollama(tmp_path, monkeypatch, **parts)
    began = time.monotonic()
    (check,) = check_servers("gguf", gguf, "m.gguf", timeout=2)
    assert time.monotonic() - began < 20
    assert check.how == RAN and not check.is_good
    assert words in check.problems[0]
    assert not is_running(int(pid.read_text()))


def test_an_absent_ollama_is_a_static_check(gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [str(check) for check in check_servers("gguf", gguf, "m.gguf")] == [
        "Ollama: checked statically (ollama is not on this machine): passed"
    ]


def test_wrong_files_are_told_without_running_anything(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = install_ollama(tmp_path, monkeypatch)
    (gguf / "Modelfile").unlink()
    (check,) = check_servers("gguf", gguf, "m.gguf")
    assert (check.how, check.problems) == (STATIC, ("there is no Modelfile for ollama create",))
    assert not pid.exists()


def test_absent_python_servers_are_static_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "is_present", lambda module: False)
    folder = build_tiny_model("qwen3", tmp_path / "tiny")
    assert [str(check) for check in check_servers("merged", folder)] == [
        "vLLM: checked statically (vllm is not installed): passed",
        "SGLang: checked statically (sglang is not installed): passed",
    ]
    (folder / "tokenizer.json").unlink()
    assert all(not check.is_good for check in check_servers("merged", folder))


def test_a_python_server_without_a_gpu_is_a_static_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "is_present", lambda module: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = build_tiny_model("qwen3", tmp_path / "tiny")
    assert {check.why for check in check_servers("merged", folder)} == {"this machine has no GPU"}


# Stands for the real packages: what child calls of them, and no more.
FAKE_VLLM = """
import sys
class SamplingParams:
    def __init__(self, max_tokens, temperature):
        assert (max_tokens, temperature) == (8, 0)
class LLM:
    def __init__(self, model, max_model_len, enforce_eager, gpu_memory_utilization):
        print("a line of the log")
        if "broken" in model:
            sys.exit("cannot load the weights")
        self.model = model
    def chat(self, turns, settings):
        from types import SimpleNamespace as N
        if "silent" in self.model:
            sys.exit(0)
        import atexit
        atexit.register(print, "a last line of the log")
        return [N(outputs=[N(text=turns[0]["content"] + " from vllm")])]
"""
FAKE_SGLANG = """
class Engine:
    def __init__(self, **settings):
        assert settings["model_path"]
    def generate(self, input_ids, sampling_params):
        return {"text": f"{len(input_ids)} tokens"}
    def shutdown(self):
        print("shut down")
"""


@pytest.mark.parametrize(
    ("name", "answer", "problem"),
    [("good", "Hello from vllm", ""), ("broken", "", "cannot load the weights"), ("silent", "", "printed no answer")],
)
def test_python_servers_run_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answer: str, problem: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{Path(child.__file__).parents[3]}")
    monkeypatch.setattr(run, "is_present", lambda module: module == "vllm")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    folder = build_tiny_model("qwen3", tmp_path / name)
    ran, static = check_servers("merged", folder, timeout=60)
    assert (ran.how, static.how) == (RAN, STATIC)
    assert ran.answer == answer
    assert len(ran.problems) == bool(problem) and problem in "".join(ran.problems)


def test_sglang_gets_the_tokens_of_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sglang.py").write_text(FAKE_SGLANG)
    monkeypatch.syspath_prepend(tmp_path)
    folder = build_tiny_model("qwen3", tmp_path / "tiny")
    from transformers import AutoTokenizer

    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    count = len(AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"])
    assert child.answer_of_sglang(str(folder)) == f"{count} tokens"


@pytest.mark.slow
def test_workers_of_a_child_end_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = textwrap.dedent(f"""
        import subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(mark)!r}, "w").write(str(worker.pid))
        time.sleep(60)
    """)
    with pytest.raises(subprocess.TimeoutExpired):
        run._run([sys.executable, "-c", code], dict(os.environ), 2)
    time.sleep(0.2)
    status = Path(f"/proc/{mark.read_text()}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_formats_without_a_server() -> None:
    assert check_servers("adapter_gguf", Path(), "a.gguf") == []
    assert check_servers("awq_gemv", Path()) == []
    assert str(ServerCheck("vLLM", STATIC, ("a", "b"), "why")) == "vLLM: checked statically (why): a; b"
