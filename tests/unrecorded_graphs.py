"""What stands in for CUDA where layers are recorded: the calls are made, and nothing is recorded."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import torch


def stand_in_for_cuda(monkeypatch):
    """Exchange what recordings ask of CUDA: it records nothing, and has a GB free. Returns what was made and called."""
    device = SimpleNamespace(graphs=[], generator=Mock(), stream=Mock())

    def graph():
        device.graphs.append(FakeGraph())
        return device.graphs[-1]

    stand_ins = {
        "CUDAGraph": graph,
        "Stream": lambda: device.stream,
        "current_device": lambda: 0,
        "current_stream": Mock,
        "default_generators": [device.generator],
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: "a pool",
        "max_memory_allocated": lambda: 0,
        "mem_get_info": lambda: (10**9, 10**9),
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "memory_snapshot": list,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device


class FakeGraph:
    """Ends as CUDA does: with an error of its own once something has failed."""

    def __init__(self):
        self.calls = []

    def replay(self):
        pass

    def capture_begin(self, **settings):
        self.calls.append(f"begin in {settings['pool']}")

    def capture_end(self):
        self.calls.append("end")
        if "failed" in self.calls:
            raise RuntimeError("operation failed due to a previous error during capture")
