"""A preparation that is killed leaves no process behind, and the next one finishes what it began."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

CODE = """
import sys
from qlora_kit.data.prepare import prepare
from qlora_kit.schema.data import DataConfig
from tests.tiny_tokenizers import smollm_tokenizer
if __name__ == "__main__":
    data = prepare(DataConfig(train_file=sys.argv[1], max_tokens=4096, processes=2), smollm_tokenizer())
    print(len(data.train))
"""


def test_kill_9_leaves_no_worker_and_the_next_run_finishes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "why " * 200, "completion": "because " * 200})
    rows.write_text("".join(f'{row[:-1]}, "n": {number}}}\n' for number in range(12000)), encoding="utf-8")
    script = tmp_path / "prepare_rows.py"
    script.write_text(CODE, encoding="utf-8")
    cache = tmp_path / "cache"
    environment = {**os.environ, "QLORA_KIT_CACHE": str(cache), "PYTHONPATH": os.getcwd()}  # noqa: PTH109
    line = [sys.executable, str(script), str(rows)]
    started = psutil.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not any(path.stat().st_size for path in cache.glob("rows/.*.partial/tokens.bin")):
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.05)
    workers = started.children(recursive=True)
    assert len(workers) >= 2
    started.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert list(cache.glob("rows/.*.partial"))
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "12000"
    assert not list(cache.glob("rows/.*.partial"))
