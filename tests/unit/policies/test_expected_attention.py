# SPDX-License-Identifier: Apache-2.0
"""What queries to come are expected to look at, against queries that are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvserve.errors import UserError
from policies.base import ModelShape
from policies.expected_attention import QUERIES_FORMAT, ExpectedAttention
from policies.thinning import Groups

SIZE, GROUP, HORIZON = 8, 16, 20
MODEL = ModelShape("toy", 1, 4, 2, SIZE, max_tokens=4096)
FREQUENCIES = torch.tensor([0.5, 0.1, 0.01])
"""The last two dimensions do not turn."""


def write(path: Path, mean: Tensor, covariance: Tensor, **changes: str) -> str:
    about = {
        "format": QUERIES_FORMAT,
        "num_layers": "1",
        "num_query_heads": "4",
        "num_kv_heads": "2",
        "head_size": str(SIZE),
    }
    tensors = {
        "frequencies": FREQUENCIES,
        "0.mean": mean,
        "0.covariance": covariance,
    }
    save_file(tensors, path, about | changes)
    return str(path)


def turned(vectors: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[n, d]`` dimension by dimension, each to its position."""
    found = vectors.clone()
    for pair, frequency in enumerate(FREQUENCIES):
        one, other = vectors[:, pair], vectors[:, pair + 3]
        cos, sin = (frequency * positions).cos(), (frequency * positions).sin()
        found[:, pair] = one * cos - other * sin
        found[:, pair + 3] = other * cos + one * sin
    return found


def test_scores_are_the_mean_attention_of_queries_to_come(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(4, SIZE, generator=random)
    factors = torch.randn(4, SIZE, SIZE, generator=random) * 0.3
    path = write(tmp_path / "q.safetensors", mean, factors @ factors.transpose(1, 2))
    keys, values = (torch.randn(1, 2, GROUP, SIZE, generator=random) for _ in range(2))
    start = 352
    positions = torch.arange(start, start + GROUP)
    policy = ExpectedAttention(queries=path, horizon=HORIZON)
    found = policy.scores(MODEL, 0, Groups(keys, values, positions[None]))
    assert found.shape == (1, 2, GROUP)
    samples = 200_000
    for head in range(2):
        seen = turned(keys[0, head], positions)
        weights = torch.zeros(GROUP)
        for query in (2 * head, 2 * head + 1):
            drawn = torch.randn(samples, SIZE, generator=random) @ factors[query].T
            drawn += mean[query]
            # A query that has the mean of all rotations behind the group.
            ahead = start + GROUP + torch.arange(HORIZON)
            averaged = torch.stack(
                [turned(drawn, place.expand(samples)) for place in ahead]
            ).mean(0)
            weights += (averaged @ seen.T / SIZE**0.5).exp().mean(0)
        expected = weights * values[0, head].norm(dim=-1)
        torch.testing.assert_close(found[0, head].exp(), expected, rtol=0.03, atol=0)


def test_scores_follow_from_the_group_and_not_from_where_it_is(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(4, SIZE, generator=random)
    path = write(tmp_path / "q.safetensors", mean, torch.eye(SIZE).repeat(4, 1, 1))
    keys = torch.randn(1, 2, GROUP, SIZE, generator=random).repeat(3, 1, 1, 1)
    positions = torch.arange(3 * GROUP).view(3, GROUP)
    scores = ExpectedAttention(queries=path).scores(
        MODEL, 0, Groups(keys, keys, positions)
    )
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_without_a_measurement_of_the_model_it_is_refused(tmp_path: Path) -> None:
    mean, covariance = torch.zeros(4, SIZE), torch.zeros(4, SIZE, SIZE)
    path = write(tmp_path / "q.safetensors", mean, covariance, num_query_heads="8")
    for policy, said in (
        (ExpectedAttention(), "^--policy expected-attention: no queries ship for toy"),
        (ExpectedAttention(queries=path), r"another model: 1 layers x 8/2 query/KV"),
        (ExpectedAttention(queries=str(tmp_path)), "cannot be read"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            policy.budgets(MODEL, 4096)
        assert "\n" not in str(caught.value)
