# SPDX-License-Identifier: Apache-2.0
"""How a policy travels: inside vLLM's ``additional_config``, to every process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig

from policies.base import Policy
from policies.registry import create_policy

CONFIG_KEY = "kvserve"


@dataclass(frozen=True)
class PolicySettings:
    """A policy by name, or by TOML file, and the arguments that override it.

    ``allow_request_policies``: whether a request may name another one.
    """

    policy: str
    policy_args: dict[str, Any] = field(default_factory=dict)
    allow_request_policies: bool = False

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> PolicySettings:
        additional = vllm_config.additional_config
        values = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        return cls(**(values or {"policy": "full"}))

    def to_additional_config(self) -> dict[str, Any]:
        values: dict[str, Any]
        values = {"policy": self.policy, "policy_args": dict(self.policy_args)}
        if self.allow_request_policies:
            values["allow_request_policies"] = True
        return {CONFIG_KEY: values}

    def create_policy(self) -> Policy:
        return create_policy(self.policy, self.policy_args)
