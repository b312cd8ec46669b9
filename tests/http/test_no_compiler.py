# SPDX-License-Identifier: Apache-2.0
"""A machine without a compiler serves every request, if more slowly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http.harness import Server, completion

pytestmark = pytest.mark.engine


def test_log_probabilities_do_not_end_an_engine_that_has_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM compiles how it ranks them, even where a model is not compiled."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    server = Server(tmp_path)
    try:
        with server.client() as client:
            for asked in ({"logprobs": 2}, {"prompt_logprobs": 2}, {"top_k": 5}, {}):
                body = completion("The capital of France is", 3, **asked)
                assert client.post("/v1/completions", json=body).status_code == 200
        assert "no-such-compiler did not compile" in server.log
    finally:
        assert server.stop() == 0
