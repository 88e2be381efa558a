"""GPUs that are seen and not used are counted, unless a launcher gives each a process."""

import torch

from qlora_kit.model.device import idle_gpus


def test_idle_gpus(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    found = []
    for count in (0, 1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        found.append(idle_gpus())
    assert found == [0, 0, 3]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert idle_gpus() == 0
