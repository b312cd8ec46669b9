# SPDX-License-Identifier: Apache-2.0
"""The endpoint plugin: vLLM calls it while it builds its server."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException

from kvserve.engine.start.admission import PolicyGuard
from kvserve.engine.start.preflight import what_fits
from kvserve.http.constraints import ConstraintGuard, guard_constraints
from kvserve.http.dashboard_page import router as dashboard
from kvserve.http.draining import drain_before_shutdown
from kvserve.http.engine import ServedPolicy
from kvserve.http.errors import (
    IN_A_BODY,
    body_exception_response,
    http_exception_response,
)
from kvserve.http.gateway import Gateway
from kvserve.http.metrics import KVMetrics
from kvserve.http.parsers import tell_of_unseen_tools
from kvserve.http.request_policies import guard_requests
from kvserve.http.routes import router
from kvserve.http.sampler import Sampler
from kvserve.start_up import tell_capacity
from policies.registry import STOCK

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.tasks import SupportedTask


class KVEndpoints:
    """Adds the routes below ``/v1/kv`` and the page ``/dashboard``."""

    name = "kvserve"
    required_tasks: ClassVar[tuple[SupportedTask, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.state.kvserve = Gateway.from_args(app.state.args)
        app.add_exception_handler(HTTPException, http_exception_response)
        for kind in IN_A_BODY:
            app.add_exception_handler(kind, body_exception_response)
        app.include_router(router)
        app.include_router(dashboard)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: argparse.Namespace
    ) -> None:
        """Get to know the engine; it runs by now."""
        assert engine_client is not None, (
            "required_tasks leaves engines out that render"
        )
        client: Any = engine_client
        config, gateway = client.vllm_config, state.kvserve
        sampler = Sampler(
            client.engine_core.call_utility_all_async, lambda: gateway.draining
        )
        report = (await sampler.sample()).report
        if report.cache is not None:
            gateway.policy = ServedPolicy(config)
            tell_capacity(what_fits(config, report.smallest_pool))
        gateway.sampler = sampler
        rule = gateway.policy.rule if gateway.policy else None
        longest = config.model_config.max_model_len
        guard = PolicyGuard(rule, longest, report.smallest_pool)
        protect = gateway.policy.protect if gateway.policy else ""
        guard_requests(client, state, guard, protect)
        guard_constraints(client, state, ConstraintGuard(config))
        tell_of_unseen_tools(state)
        if config.parallel_config._api_process_rank <= 0:
            sampler.metrics = _metrics_of(gateway, config)
            state.kvserve_metrics = asyncio.create_task(sampler.keep_metrics())
        drain_before_shutdown(client, state)


def _metrics_of(gateway: Gateway, config: Any) -> KVMetrics:
    policy = gateway.policy
    return KVMetrics(
        policy.name if policy else STOCK,
        policy.changed_arguments if policy else "",
        str(config.model_config.served_model_name),
        budgets=policy.budgets if policy else (),
    )
