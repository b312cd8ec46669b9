# SPDX-License-Identifier: Apache-2.0
"""Every command works where nothing but this machine can be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from kvserve.bench.server import free_port
from tests.engine.servers import wait_until_healthy

pytestmark = pytest.mark.engine

_GUARD = Path(__file__).parent / "loopback"
_ROOT = Path(__file__).parents[2]
_COMMAND = (sys.executable, "-m", "kvserve.cli")
_SECONDS = 600
_SERVE = ("--enforce-eager", "--max-model-len", "1024")
_MEMORY = ("--kv-memory", "128MiB")

COMMANDS = {
    "plan": ["plan", *_MEMORY, "--max-model-len", "1024"],
    "bench": [
        *("bench", "--requests", "1", "--prompt-tokens", "32", "--output-tokens", "4"),
        *(*_MEMORY, "--policy", "retrieval", "--", *_SERVE),
    ],
    "eval": [
        *("eval", "--length", "512", "--samples", "1", "--task", "needle"),
        *("--policy", "sink-recent:budget=50%", "--out", "report"),
    ],
    "profile retrieval": ["profile", "retrieval", "--fast", "--out", "found"],
    "profile moa": [
        *("profile", "moa", "--lengths", "512", "--items", "1", "--intervals", "1"),
        *("--validation-length", "512", "--validation-items", "1", "--out", "found"),
    ],
}
_QUICK = ("plan",)


class Offline:
    """An environment without a network, where every try is written down."""

    def __init__(self, folder: Path, variable: bool) -> None:
        self.folder, self._tried = folder, folder / "tried"
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "HF"))
        }
        path = f"{_GUARD}{os.pathsep}{_ROOT}"
        self.environment = kept | {
            **{"PYTHONPATH": path, "KVSERVE_TEST_TRIED": str(self._tried)},
            "HF_HOME": str(folder / "empty"),
            **({"HF_HUB_OFFLINE": "1"} if variable else {}),
        }

    @property
    def tried(self) -> str:
        return self._tried.read_text() if self._tried.exists() else ""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_COMMAND, *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )


@pytest.fixture(params=[True, False], ids=["HF_HUB_OFFLINE", "unset"])
def offline(request: pytest.FixtureRequest, tmp_path: Path) -> Offline:
    return Offline(tmp_path, request.param)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
        for name in COMMANDS
    ],
)
def test_a_command_asks_nobody(name: str, offline: Offline) -> None:
    done = offline.run(*COMMANDS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    assert offline.tried == ""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["retrieval", "none"])
def test_a_server_asks_nobody(policy: str, offline: Offline) -> None:
    port, log = free_port(), offline.folder / "log"
    flags = ("serve", "--policy", policy, "--host", "127.0.0.1", "--port", str(port))
    command = [*_COMMAND, *flags, *_SERVE, "--kv-cache-memory-bytes", "128M"]
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env=offline.environment
        ) as process,
    ):
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_healthy(base, process, log)
            body = {"prompt": "The capital of France is", "max_tokens": 4}
            request = urllib.request.Request(
                f"{base}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as reply:
                assert json.load(reply)["choices"][0]["text"]
        finally:
            process.terminate()
            process.wait(60)
    assert offline.tried == ""


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("serve", marks=pytest.mark.slow),
        pytest.param("serve --policy none", marks=pytest.mark.slow),
        pytest.param("plan --kv-memory 128MiB", marks=pytest.mark.slow),
        pytest.param("bench", marks=pytest.mark.slow),
        pytest.param("eval", marks=pytest.mark.slow),
        "profile retrieval",
        pytest.param("profile moa", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_one_line(
    command: str, offline: Offline
) -> None:
    done = offline.run(*command.split(), "no-such/model")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kvserve: error: ")
    assert "MODEL no-such/model: no such directory, and not in " in last
    assert "Traceback" not in done.stderr
    is_set = "HF_HUB_OFFLINE" in offline.environment
    assert ("HF_HUB_OFFLINE" in last) == is_set
    assert (offline.tried == "") == is_set
