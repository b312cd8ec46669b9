# SPDX-License-Identifier: Apache-2.0
"""Who shares prefixes when nobody says so."""

from __future__ import annotations

from typing import Any

import pytest

from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options

_OURS = "kvserve.engine.scheduling.scheduler.HeadPagedScheduler"


def chosen(policy: str, mixed: bool = False, **options: Any) -> tuple[Any, Any]:
    settings = PolicySettings(policy, allow_request_policies=mixed)
    found = engine_options(settings, options)
    return found["enable_prefix_caching"], found["scheduler_cls"]


@pytest.mark.parametrize("policy", ["full", "retrieval", "moa", "sharded", "keydiff"])
def test_policies_whose_cache_follows_from_the_prefix_leave_it_to_the_model(
    policy: str,
) -> None:
    assert chosen(policy) == (None, _OURS)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "heterogeneous"])
def test_policies_that_select_after_the_prompt_do_not_share(policy: str) -> None:
    assert chosen(policy) == (False, _OURS)


def test_what_is_asked_for_is_done() -> None:
    assert chosen("full", enable_prefix_caching=False) == (False, _OURS)
    assert chosen("full", enable_prefix_caching=True) == (True, _OURS)
    assert chosen("full", mixed=True, enable_prefix_caching=True) == (True, _OURS)


def test_requests_that_may_name_any_policy_do_not_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chosen("full", mixed=True) == (False, _OURS)
    assert "--enable-prefix-caching" in capsys.readouterr().err


def test_another_scheduler_does_without() -> None:
    assert chosen("full", scheduler_cls="my.Scheduler") == (False, "my.Scheduler")
