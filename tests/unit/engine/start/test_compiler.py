# SPDX-License-Identifier: Apache-2.0
"""A start that compiles says in one line what it lacks for that."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from torch._inductor import config as inductor

from kvserve.engine.start.compiler import check_compiler
from kvserve.errors import UserError


def test_a_start_that_compiles_is_refused_without_a_compiler() -> None:
    missing = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(UserError, match=r"no C\+\+ compiler: install g\+\+"):
        check_compiler()


def test_a_start_that_compiles_is_refused_without_pythons_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=rf"no {tmp_path}/Python\.h: .*python3-dev"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()
