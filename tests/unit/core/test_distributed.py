"""Which of several processes this one is, by what each launcher sets."""

import pytest

from qlora_kit.core import distributed
from qlora_kit.core.distributed import RANKS, is_main, local_rank, local_world_size, main_first, rank, world_size


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*RANKS, "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_it_is_the_only_one():
    assert (rank(), world_size(), local_rank(), local_world_size(), is_main()) == (0, 1, 0, 1, True)


def test_torchrun_tells_all_four(monkeypatch):
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert (rank(), world_size(), local_rank(), local_world_size(), is_main()) == (9, 16, 1, 8, False)


@pytest.mark.parametrize("name", ["PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"])
def test_launchers_of_mpi_tell_the_rank(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    assert (rank(), is_main()) == (3, False)
    monkeypatch.setenv(name, "")
    assert is_main()


@pytest.mark.parametrize(("number", "order"), [("0", ["block", "barrier"]), ("1", ["barrier", "block"])])
def test_the_main_process_is_through_the_block_before_the_others(monkeypatch, number, order):
    monkeypatch.setenv("RANK", number)
    seen = []
    monkeypatch.setattr(distributed, "barrier", lambda: seen.append("barrier"))
    with main_first():
        seen.append("block")
    assert seen == order
