# SPDX-License-Identifier: Apache-2.0
"""How a policy travels: inside vLLM's ``additional_config``, to every process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig

from policies.base import Policy
from policies.budgets import PolicySpec
from policies.files import expect

CONFIG_KEY = "kvserve"
FILES = "files"
"""Below it: digests of what the policy reads, by path, as the first process read it."""


@dataclass(frozen=True)
class PolicySettings:
    """A policy as typed, ``NAME[:KEY=VALUE,...]`` or a TOML file, and more arguments.

    ``allow_request_policies``: whether a request may name another one. ``protect``:
    whose tokens are protected, ``system`` or ``requests``; nobody's, if it is empty.
    """

    policy: str
    policy_args: dict[str, Any] = field(default_factory=dict)
    allow_request_policies: bool = False
    protect: str = ""

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> PolicySettings:
        additional = vllm_config.additional_config
        values = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
        values = dict(values or {"policy": "full"})
        expect(values.pop(FILES, {}))
        return cls(**values)

    def to_additional_config(self) -> dict[str, Any]:
        values: dict[str, Any]
        values = {"policy": self.policy, "policy_args": dict(self.policy_args)}
        if self.allow_request_policies:
            values["allow_request_policies"] = True
        if self.protect:
            values["protect"] = self.protect
        return {CONFIG_KEY: values}

    @property
    def spec(self) -> PolicySpec:
        return PolicySpec.parse(self.policy, self.policy_args)

    def without_budget(self) -> Policy:
        """The policy before its model is known: its kind and record."""
        return self.spec.without_budget()
