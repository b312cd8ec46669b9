# SPDX-License-Identifier: Apache-2.0
"""What routes say of heads that are thinned."""

from __future__ import annotations

from kvserve.http.engine import history_of
from kvserve.http.models import Budgets
from kvserve.plan.streaming import StreamRule
from policies.base import ModelShape
from policies.kvzap import KVzap
from policies.sink_recent import SinkRecent

MODEL = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64, 4096)


def test_what_each_head_keeps_of_a_group_is_told_where_some_are_thinned() -> None:
    policy = KVzap(budget=0.25)
    plan = StreamRule(policy, MODEL, 32, 4096).longest
    retained = plan.lane_tokens(4096).tolist()
    body = Budgets(context=4096, rows="heads", retained=retained, **history_of(plan))
    assert body.group == 128
    assert body.keep is not None
    wanted = [
        [None if head.keep == 128 else head.keep for head in layer]
        for layer in policy.budgets(MODEL, 4096)
    ]
    assert body.keep == wanted
    assert len({kept for layer in wanted for kept in layer}) > 10
    assert history_of(StreamRule(SinkRecent(), MODEL, 32, 4096).longest) == {}
