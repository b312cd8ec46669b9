# SPDX-License-Identifier: Apache-2.0
"""Workers share a machine's cores, or a container's quota, or keep to the user's."""

from __future__ import annotations

import os

import pytest
import torch

from kvserve import cores
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options, prepare_environment

pytestmark = pytest.mark.engine


def machine(visible: int, quota: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have cores; what is set for them lasts as long as the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(visible)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "_ASKED", "")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0,1,2,3,4"),
        ({"tensor_parallel_size": 2}, "0,1|2,3,4"),
        ({"data_parallel_size": 2}, "0,1|2,3,4"),
        ({"data_parallel_size": 8, "data_parallel_size_local": 2}, "0,1|2,3,4"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, "0|1|2|3,4"),
        ({"tensor_parallel_size": 8}, "nobind"),
    ],
)
def test_every_worker_gets_cores_of_its_own(
    options: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(5, None, monkeypatch)
    for before in (None, "0,1,2,3,4", "0,1|2,3,4"):  # as earlier engines left it
        monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
        if before is not None:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", before)
        prepare_environment(options)
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == expected


@pytest.mark.parametrize(
    ("options", "threads", "said"),
    [
        ({}, "4", "1 worker x 4 threads on 4 of 16 cores: the CPU quota is 4"),
        ({"data_parallel_size": 2}, "2", "2 workers x 2 threads on 4 of 16 cores: "),
        ({"tensor_parallel_size": 8}, "1", "8 workers x 1 thread on 4 of 16 cores: "),
    ],
)
def test_workers_share_the_quota_of_a_container(
    options: dict[str, int], threads: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(16, 4.0, monkeypatch)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    assert prepare_environment(options).startswith(said)
    assert os.environ["OMP_NUM_THREADS"] == threads
    # Another container may have chosen the first cores as well.
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(
    ("binding", "in_engine"), [("nobind", True), ("auto", True), ("2-3", False)]
)
def test_cores_that_the_user_names_are_those_of_a_worker_of_its_own(
    binding: str, in_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM binds the threads of worker processes alone."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    options = engine_options(PolicySettings("full"), {})
    assert ("distributed_executor_backend" in options) == in_engine
