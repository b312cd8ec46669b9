# SPDX-License-Identifier: Apache-2.0
"""The example of docs/writing-a-policy.md, installed as its reader would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import Model

pytestmark = pytest.mark.engine

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS / "examples" / "key-norm"
_SCRIPT = """
import sys
from kvserve import LLM
from vllm import SamplingParams
llm = LLM(
    sys.argv[1], policy="key-norm", policy_args={"capacity": 64}, dtype="float32",
    max_model_len=512, kv_cache_memory_bytes=64 << 20, enforce_eager=True,
)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
(output,) = llm.generate([{"prompt_token_ids": list(range(8, 308))}], params)
print("tokens", len(output.outputs[0].token_ids))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the example package is installed, beside kvserve."""
    folder = tmp_path_factory.mktemp("third-party")
    source = shutil.copytree(EXAMPLE, folder / "source")
    install = ["-m", "uv", "pip", "install", "--no-deps", "--no-build-isolation", "-q"]
    target = ["--python", sys.executable, "--target", str(folder / "site")]
    subprocess.run([sys.executable, *install, *target, str(source)], check=True)
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_page_shows_the_files_of_the_example() -> None:
    page = (DOCS / "writing-a-policy.md").read_text()
    for name in ("key_norm.py", "pyproject.toml"):
        assert (EXAMPLE / name).read_text().strip() in page


def test_a_policy_of_another_package_is_listed(environment: dict[str, str]) -> None:
    listed = run(environment, "-m", "kvserve.cli", "policies")
    assert "key-norm\n" in listed
    assert "capacity = 512 (at least 64)" in listed


def test_a_policy_of_another_package_serves(
    environment: dict[str, str], models: dict[str, Model]
) -> None:
    printed = run(environment, "-c", _SCRIPT, str(models["tiny-gqa"].path))
    assert "tokens 5" in printed
