# SPDX-License-Identifier: Apache-2.0
"""Rules of servers whose requests may name policies of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvserve.plan.mixed import MixedRule
from kvserve.plan.streaming import StreamRule
from policies.base import ModelShape, StreamingPolicy
from policies.full import Full

MODEL = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64, 2048)
ALONE = StreamRule(Full(), MODEL, 32, 2048)
RULE = MixedRule(ALONE, step_tokens=256)


def under(policy: StreamingPolicy, **values: Any) -> MixedRule:
    """The rule of a server that was started with ``policy``."""
    alone = dataclasses.replace(ALONE, policy=policy, **values)
    return dataclasses.replace(RULE, default=alone)
