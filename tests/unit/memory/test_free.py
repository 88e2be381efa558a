"""Free memory of the host is what the container leaves, where there is one."""

import psutil
import pytest

from qlora_kit.memory import free


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(free, "CGROUP", tmp_path)

    def write(limit, used, cached):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")

    return write


def test_a_containers_limit_counts_without_its_file_cache(group):
    group(1_000_000, 300_000, 100_000)
    assert free.free_host_bytes() == 800_000


@pytest.mark.parametrize("limit", ["max", 1 << 60])
def test_without_a_limit_it_is_the_machines(group, limit):
    group(limit, 300_000, 100_000)
    assert free.free_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_machine_without_groups(group):
    assert free.free_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
