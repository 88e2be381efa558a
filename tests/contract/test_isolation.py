"""A test sees nothing of the tests before it, and reaches no other machine."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from tests.isolation import NetworkRefusedError, as_before, is_here


@pytest.mark.parametrize("turn", ["first", "second"])
def test_generators_start_every_test_at_the_same_number(turn):
    drawn = random.random(), numpy.random.rand(), torch.rand(1).item()
    # The first numbers that CPython, numpy and torch document for the seed 0
    assert drawn == pytest.approx((0.8444218515, 0.5488135039, 0.4962565899), abs=1e-9)


def test_environment_and_folder_are_as_before(tmp_path, monkeypatch):
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("REMOVED", "before")
    folder = Path.cwd()
    with pytest.raises(ZeroDivisionError), as_before():
        os.environ.update({"CHANGED": "after", "ADDED": "after"})
        del os.environ["REMOVED"]
        os.chdir(tmp_path)
        raise ZeroDivisionError
    assert (os.environ["CHANGED"], os.environ["REMOVED"], os.environ.get("ADDED")) == ("before", "before", None)
    assert Path.cwd() == folder


LEAK = "import os\ndef test_sets(tmp_path):\n    os.environ['LEAK'] = 'yes'\n    os.chdir(tmp_path)\n"
FIND = "\ndef test_finds():\n    assert 'LEAK' not in os.environ\n    assert os.getcwd() == HERE\n"


@pytest.mark.slow
@pytest.mark.libraries
def test_what_a_test_sets_does_not_reach_the_next(tmp_path):
    tests = Path(__file__).parents[1]
    (tmp_path / "tests").symlink_to(tests)
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "test_two.py").write_text(f"HERE = {str(tmp_path)!r}\n{LEAK}{FIND}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path]
    done = subprocess.run(
        [*command, "test_two.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert "2 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.invalid", 443),
        lambda: socket.socket(socket.AF_INET6).connect_ex(("2001:db8::1", 80)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
    ],
    ids=["connect", "name", "sixth", "datagram"],
)
def test_another_machine_is_refused_and_the_test_named(reach):
    with pytest.raises(NetworkRefusedError, match=r"test_another_machine_is_refused.* tests use no network"):
        reach()


def test_this_machine_is_reached(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        os.chdir(tmp_path)  # the path of such a socket has at most 107 bytes
        server.bind("s")
        server.listen()
        client.connect("s")


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.53", True),
        ("::1", True),
        (b"localhost", True),
        (None, True),
        ("huggingface.co", False),
        ("8.8.8.8", False),
    ],
)
def test_which_hosts_are_this_machine(host, here):
    assert is_here(host) is here


def test_programs_that_a_test_starts_know_no_hub():
    code = "import os; print(os.environ['HF_HUB_OFFLINE'], 'HF_TOKEN' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
