# SPDX-License-Identifier: Apache-2.0
"""What thinning would cost, against attention that mixes what is thinned in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kvserve.profiling.attention_hook import PromptAttention
from kvserve.profiling.head_shares import lower_hull, share_ladder
from kvserve.profiling.history_cost import (
    GROUP,
    LADDER,
    SINKS,
    HistoryProbe,
    first_raw,
    measure_history,
)
from kvserve.profiling.recital import Recital
from policies.thinning import Groups
from tests.unit.tiny_llama import KV_HEADS, LAYERS, QUERY_HEADS, tiny_llama

TOKENS = 700
SCORES = torch.rand(
    LAYERS, KV_HEADS, TOKENS, generator=torch.Generator().manual_seed(0)
)


def rank(layer: int, groups: Groups) -> Tensor:
    return SCORES[layer][:, groups.positions].transpose(0, 1)


def visible(layer: int, head: int, keep: int) -> Tensor:
    """What queries see, by the rule written out, ``[TOKENS, TOKENS]``."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for query in range(TOKENS):
        window = (query // 32 - 3) * 32
        for first in range(SINKS, TOKENS, GROUP):
            if first + GROUP <= window:
                scores = SCORES[layer, head, first : first + GROUP]
                lost = scores.argsort(descending=True)[keep:] + first
                mask[query, lost] = False
    return mask


class Mixing(PromptAttention):
    """Attention one head of which is a part thinned."""

    name = "mixing"

    def __init__(self, layer: int, head: int, keep: int) -> None:
        self.where, self.mask = (layer, head), visible(layer, head, keep)
        self.part = torch.zeros((), requires_grad=True)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        group = QUERY_HEADS // KV_HEADS
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        attend = functional.scaled_dot_product_attention
        output = attend(query, key, value, is_causal=True, scale=scale)
        if layer != self.where[0]:
            return output
        heads = torch.arange(QUERY_HEADS) // group == self.where[1]
        thin = attend(query, key, value, attn_mask=self.mask, scale=scale)
        return torch.lerp(output, thin, self.part * heads[None, :, None, None].float())


@pytest.mark.parametrize(("layer", "head", "rung"), [(0, 0, 0), (1, 1, 6), (2, 0, 11)])
def test_changes_are_the_slopes_of_thinning_a_head(
    layer: int, head: int, rung: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(257, (TOKENS,), generator=generator).tolist()
    recital = Recital(tokens, [*range(640, 660)])
    model, probe = tiny_llama(vocab_size=257), HistoryProbe(rank)
    probe.attach(model)
    costs = measure_history(model, probe, recital, seed=0)
    assert costs.shape == (LAYERS, KV_HEADS, len(LADDER))
    torch.testing.assert_close(costs[..., -1], torch.zeros(LAYERS, KV_HEADS))
    plain = tiny_llama(vocab_size=257)
    mixing = Mixing(layer, head, LADDER[rung])
    mixing.attach(plain)
    places = torch.arange(640, 660) - 1
    logits = plain(torch.tensor([tokens]), use_cache=False).logits[0, places]
    log_probs = logits.log_softmax(-1)
    drawn = torch.multinomial(
        log_probs.detach().exp(), 1, generator=torch.Generator().manual_seed(0)
    )
    loss = -log_probs.gather(1, drawn).sum()
    (slope,) = torch.autograd.grad(loss, mixing.part)
    expected = slope.square() / 2 / 20
    torch.testing.assert_close(costs[layer, head, rung], expected, rtol=1e-2, atol=1e-7)


def test_what_is_raw_begins_with_the_first_group_in_the_window() -> None:
    queries = torch.tensor([0, 127, 160, 255, 256, 383, 384, 4095])
    expected = [32, 32, 32, 32, 160, 160, 288, 3872]
    assert first_raw(queries).tolist() == expected


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12))
def test_a_hull_is_convex_and_nowhere_above(costs: list[float]) -> None:
    points = [*enumerate(costs)]
    hull = lower_hull(points)
    assert (hull[0], hull[-1]) == (points[0], points[-1])
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
    assert slopes == sorted(slopes)
    for (left, low), (right, high) in pairwise(hull):
        for place in range(left, right + 1):
            line = low + (high - low) * (place - left) / (right - left)
            assert line <= costs[place] + 1e-9


@given(st.integers(0, 1 << 16))
def test_each_level_is_split_whole_and_heads_never_keep_less_of_more(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shares = share_ladder(torch.rand(2, 3, len(LADDER), generator=random))
    levels = torch.tensor([0.005, 0.125, 0.9])
    assert shares.mean((1, 2))[[0, 9, -1]].tolist() == pytest.approx(levels.tolist())
    assert (shares.diff(dim=0) >= -1e-6).all()
    assert 0 <= shares.min() <= shares.max() <= 1


def test_tokens_go_to_the_heads_that_pay_most_for_each() -> None:
    ladder = torch.tensor(LADDER).float() / GROUP
    costs = torch.stack([3 * (1 - ladder), (1 - ladder) ** 2, 0 * ladder])[None]
    shares = share_ladder(costs, levels=(1 / 3, 0.5, 0.8))
    torch.testing.assert_close(shares[0], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(shares[1], torch.tensor([[1.0, 0.5, 0.0]]))
    torch.testing.assert_close(shares[2], torch.tensor([[1.0, 1.0, 0.4]]))
