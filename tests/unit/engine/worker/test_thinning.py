# SPDX-License-Identifier: Apache-2.0
"""Policies that thin are tried before any request, and ties are the later token's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvserve.engine.clock import Clock
from kvserve.engine.worker.thinning import Thinner, best_places
from kvserve.errors import UserError
from policies.kvzap import KVzap
from policies.thinning import ThinningPolicy
from tests.reference.thinning import best
from tests.unit.policies.test_kvzap import ABOUT, MODEL, tensors, write

CPU = torch.device("cpu")


def tried(policy: ThinningPolicy) -> None:
    nobody: Any = None
    rotations = [None] * MODEL.num_layers
    thinner = Thinner(policy, MODEL, rotations, nobody, nobody, cast(Clock, nobody))
    thinner.try_policy(128, CPU)


def test_a_scorer_of_this_model_is_let_pass(tmp_path: Path) -> None:
    tried(KVzap(weights=write(tmp_path / "kvzap.safetensors")))


def test_a_scorer_of_other_sizes_is_refused_before_any_request(tmp_path: Path) -> None:
    parts = tensors()
    parts["1.hidden.weight"] = torch.ones(5, 47)
    path = tmp_path / "kvzap.safetensors"
    save_file(parts, path, ABOUT)
    with pytest.raises(
        UserError, match=r"^--policy kvzap: cannot judge .* layer 1 "
    ) as e:
        tried(KVzap(weights=str(path)))
    assert "\n" not in str(e.value)


def test_a_file_that_was_cut_off_is_refused_before_any_request(tmp_path: Path) -> None:
    path = tmp_path / "kvzap.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"^--policy kvzap: cannot judge tokens"):
        tried(KVzap(weights=str(path)))


scores = st.lists(st.integers(-(1 << 20), 1 << 20), min_size=8, max_size=8)
HEADS: dict[str, int] = {"min_size": 3, "max_size": 3}


@given(st.lists(scores, **HEADS), st.lists(st.integers(0, 8), **HEADS))
def test_the_highest_scores_stay_and_of_equal_ones_the_later(
    by_head: list[list[int]], keep: list[int]
) -> None:
    scored = torch.tensor(by_head, dtype=torch.float32)[:, None]
    found = best_places(scored, torch.tensor(keep), max(keep))
    for head, count in enumerate(keep):
        assert found[head, 0, :count].tolist() == best(by_head[head], count)
