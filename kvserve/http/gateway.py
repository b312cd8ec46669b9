# SPDX-License-Identifier: Apache-2.0
"""What the routes and the middleware of one API process share."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from starlette.types import Scope

from kvserve.http.engine import ServedPolicy
from kvserve.http.sampler import Sampler
from kvserve.http.settings import HttpSettings


@dataclass
class Gateway:
    """One for each API process, at ``app.state.kvserve``.

    Attributes:
        settings: what the flags say.
        api_keys: any of them opens every route.
        sampler: asks the engine; ``None`` until the engine is up.
        policy: what is served; ``None`` for stock vLLM.
        active: requests for work that are being answered.
        draining: whether the server is about to stop and takes no new work.
    """

    settings: HttpSettings
    api_keys: tuple[str, ...] = ()
    sampler: Sampler | None = None
    policy: ServedPolicy | None = None
    active: int = 0
    draining: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Gateway:
        keys = args.api_key or [os.environ.get("VLLM_API_KEY")]
        return cls(HttpSettings.from_args(args), tuple(key for key in keys if key))


def gateway_of(scope: Scope) -> Gateway:
    """Return the gateway of the app that handles a request."""
    state = scope["app"].state
    if not hasattr(state, "kvserve"):
        state.kvserve = Gateway.from_args(state.args)
    gateway: Gateway = state.kvserve
    return gateway


def path_of(scope: Scope) -> str:
    """Return the path of a request as routes name it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_request(scope: Scope) -> bool:
    """Tell a request from the start and the end of the app."""
    return scope["type"] in ("http", "websocket")


def is_work(scope: Scope) -> bool:
    """Tell whether a request asks for work instead of looking at something."""
    return scope["type"] == "websocket" or (
        scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
    )
