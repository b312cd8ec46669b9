# SPDX-License-Identifier: Apache-2.0
"""A process that watches over its parent ends after it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

# Without vLLM, which takes seconds to import, and whose functions are not called here.
_PARENT = """
import multiprocessing, signal, sys, time
from types import ModuleType, SimpleNamespace

names = ["vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.core", "vllm.v1.utils"]
sys.modules |= {{name: ModuleType(name) for name in names}}
sys.modules["vllm.v1"].utils = sys.modules["vllm.v1.utils"]
sys.modules["vllm.v1.utils"].run_api_server_worker_proc = None
stock = SimpleNamespace(run_engine_core=None)
sys.modules["vllm.v1.engine.core"].EngineCoreProc = stock

from kvserve.engine.scheduling import orphans

def engine(deaf):
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("runs", flush=True)
    time.sleep(600)

orphans._GRACE_SECONDS = 1.0
orphans._stock = orphans._stock_api_server = engine
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(
        target=orphans.{target}, args=({deaf},)
    )
    process.start()
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("method", "target", "deaf"),
    [
        ("fork", "run_engine_core", True),
        pytest.param("spawn", "run_engine_core", False, marks=pytest.mark.slow),
        ("spawn", "run_api_server", True),
    ],
)
def test_a_process_ends_with_a_parent_that_is_killed(
    method: str, target: str, deaf: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("parent") / "parent.py"
    script.write_text(_PARENT.format(method=method, target=target, deaf=deaf))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"runs\n"
            children = psutil.Process(parent.pid).children(recursive=True)
            assert children
        finally:
            parent.kill()
        _, left = psutil.wait_procs(children, timeout=10)
        assert left == []
