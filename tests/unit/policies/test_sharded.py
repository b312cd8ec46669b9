# SPDX-License-Identifier: Apache-2.0
"""Shards: the pattern of DKernel's own test, Phi-3-small's shares, who may use them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvserve.errors import UserError
from kvserve.plan.page_plan import PagePlan
from policies.base import FULL, HeadBudget, ModelShape
from policies.sharded import Sharded
from tests.reference.visibility import visible_blocks

TOY = ModelShape("toy", 2, 8, 4, 8)
PHI3_SMALL = ModelShape(
    "phi-3-small",
    32,
    32,
    8,
    128,
    pattern=(
        ("blocksparse_block_size", 64),
        ("blocksparse_homo_head_pattern", False),
        ("blocksparse_num_local_blocks", 16),
        ("blocksparse_vert_stride", 8),
        ("dense_attention_every_n_layers", 2),
    ),
)


def plan_of(model: ModelShape, **values: Any) -> PagePlan:
    policy = Sharded(**values)
    return PagePlan.from_budgets(policy.budgets(model, 1 << 20), policy.page_size)


def toy_plan(**values: Any) -> PagePlan:
    return plan_of(TOY, **{"block": 32, "insist": True, **values})


def formula(
    query: int, key: int, head: int, local: int, stride: int, step: int, offset: int
) -> bool:
    """Visibility of blocks, as the paper's code computes it."""
    on_stride = (key + head * step + offset) % stride == 0
    return key <= query and (query - key < local or on_stride)


def test_the_pattern_is_that_of_dkernels_own_test() -> None:
    plan = toy_plan(local_blocks=2, stride=3, offset=0, homo_head=True)
    expected = [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 3, 4],
        [0, 3, 4, 5],
        [0, 3, 5, 6],
        [0, 3, 6, 7],
    ]
    for head in range(TOY.num_kv_heads):
        found = [visible_blocks(plan, 0, head, block) for block in range(8)]
        assert found == expected


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize(("stride", "step"), [(3, None), (4, 1), (8, 2), (9, None)])
def test_every_kv_head_sees_its_own_shard(
    stride: int, step: int | None, offset: int
) -> None:
    plan = toy_plan(local_blocks=2, stride=stride, step=step, offset=offset)
    shift = max(1, stride // 4) if step is None else step
    for head in range(TOY.num_kv_heads):
        for query in range(30):
            assert visible_blocks(plan, 1, head, query) == [
                key
                for key in range(30)
                if formula(query, key, head, 2, stride, shift, offset)
            ]


@pytest.mark.parametrize("stride", range(1, 65))
def test_every_stride_that_may_be_asked_for_makes_the_plan_of_the_formula(
    stride: int,
) -> None:
    model = dataclasses.replace(TOY, num_query_heads=64, num_kv_heads=64)
    policy = Sharded(block=32, local_blocks=3, stride=stride, step=1, insist=True)
    plan = PagePlan.from_budgets(policy.budgets(model, 1 << 20), 32)
    query = 3 * stride + 5
    for head in (0, 1, 31, 62, 63):
        assert visible_blocks(plan, 1, head, query) == [
            key
            for key in range(query + 1)
            if formula(query, key, head, 3, stride, 1, 1)
        ]


@pytest.mark.parametrize("stride", [63, 64, 65, 200, 1000])
def test_a_policy_of_ones_own_may_have_longer_turns(stride: int) -> None:
    shards = frozenset({0, stride // 2, stride - 1})
    budgets = ((HeadBudget(0, 64, stride, shards),),)
    plan = PagePlan.from_budgets(budgets, 32)
    for query in (stride - 1, stride, 3 * stride + 1):
        assert visible_blocks(plan, 0, 0, query) == [
            key for key in range(query + 1) if query - key < 2 or key % stride in shards
        ]


def test_a_kv_head_of_query_patterns_sees_the_shards_of_its_group() -> None:
    plan = toy_plan(local_blocks=2, stride=8, pattern="query")
    for head in range(TOY.num_kv_heads):
        for query in range(30):
            assert visible_blocks(plan, 0, head, query) == [
                key
                for key in range(30)
                if formula(query, key, 2 * head, 2, 8, 1, 1)
                or formula(query, key, 2 * head + 1, 2, 8, 1, 1)
            ]


def test_the_heads_of_a_layer_see_everything_between_them() -> None:
    plan = toy_plan(local_blocks=1, stride=4, step=1)
    for query in range(20):
        seen = {b for head in range(4) for b in visible_blocks(plan, 0, head, query)}
        assert seen == set(range(query + 1))


def test_a_stride_of_one_keeps_everything() -> None:
    plan = toy_plan(local_blocks=1, stride=1)
    assert plan == plan.full


@pytest.mark.parametrize(
    ("tokens", "per_query", "per_kv", "overall"),
    [
        (8192, 0.234, 0.563, 0.781),
        (32768, 0.152, 0.516, 0.758),
        (131072, 0.132, 0.504, 0.752),
    ],
)
def test_phi_3_small_keeps_the_shares_that_were_worked_out_by_hand(
    tokens: int, per_query: float, per_kv: float, overall: float
) -> None:
    def share(**values: Any) -> float:
        plan = plan_of(PHI3_SMALL, **values)
        return plan.pages(tokens) / plan.full.pages(tokens)

    # One shard a head, as every query head of the model has by itself.
    assert share(pattern="kv", insist=True) == pytest.approx(per_query, abs=0.001)
    union = share(insist=True)
    assert union == pytest.approx(per_kv, abs=0.001)
    whole = share(dense_every=2)
    assert whole == pytest.approx(overall, abs=0.001)


def test_dense_layers_and_heads_keep_everything() -> None:
    policy = Sharded(dense_every=2, dense_heads=1, insist=True)
    first, second = policy.budgets(TOY, 4096)
    assert second == (FULL,) * 4
    assert [head.is_full for head in first] == [False, False, False, True]


def test_a_model_that_was_not_trained_with_shards_is_refused() -> None:
    with pytest.raises(UserError, match="toy declares no block-sparse") as caught:
        Sharded().budgets(TOY, 4096)
    assert "insist=true" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "not trained with shards" in Sharded(insist=True).remark(TOY)


def test_a_model_that_declares_its_shards_is_served_without_a_warning() -> None:
    policy = Sharded(dense_every=2)
    assert len(policy.budgets(PHI3_SMALL, 4096)) == 32
    assert policy.remark(PHI3_SMALL) == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "dense_every=None: phi-3-small was trained with .*; pass `dense_every=2`"),
        ({"dense_every": 2, "stride": 4}, "stride=4: .* pass `stride=8`"),
        ({"dense_every": 2, "homo_head": True}, "homo_head=True: .* `homo_head=False`"),
    ],
)
def test_a_pattern_that_the_model_does_not_declare_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Sharded(**values).budgets(PHI3_SMALL, 4096)
    insisting = dataclasses.replace(Sharded(**values), insist=True)
    assert insisting.budgets(PHI3_SMALL, 4096)
