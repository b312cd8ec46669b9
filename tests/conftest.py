# SPDX-License-Identifier: Apache-2.0
"""What every test needs before vLLM or torch is imported."""

from __future__ import annotations

import os

import pytest

_CORES = len(os.sched_getaffinity(0))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

_ENVIRONMENT = {
    # Scheduler and worker in this process: tests step them and look inside.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Tests that run side by side share the cores.
    "OMP_NUM_THREADS": str(max(_CORES // _WORKERS, 1)),
    # Threads that spin for work take many times longer on cores that others share.
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
}

for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

_LONGEST = (
    *("test_identity", "test_request_policies", "test_dense_policies"),
    *("test_prefix_cache", "test_oracle", "test_triton_compiles", "test_eval"),
    *("test_quality", "test_isolation", "test_local_layers", "test_page_formats"),
    *("test_prefix_pages", "test_tensor_parallel", "test_no_leak", "test_memory"),
    # Of those that start servers, the load that another's numbers would suffer from.
    *("test_triton_engine", "test_soak", "test_shutdown", "test_api_servers"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: else a core would wait for the last."""
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
