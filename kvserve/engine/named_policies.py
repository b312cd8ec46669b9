# SPDX-License-Identifier: Apache-2.0
"""Where a request says its policy, and whether the server takes it.

vLLM carries ``vllm_xargs`` of a body to ``SamplingParams.extra_args``, and these to
scheduler and worker. Both of them trust what :class:`PolicyGuard` let pass.
"""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig

from kvserve.dense_plan import DenseRule
from kvserve.engine.support import Rule, rule_of, scratch_of
from kvserve.errors import UserError
from kvserve.request_policies import rule_named, without_budget
from kvserve.stream_rule import StreamRule
from policies.base import DensePolicy

KEY = "kv_policy"


def named_in(params: Any) -> object:
    """What a request names, or ``None``."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None


def rule_of_request(
    rule: Rule, params: SamplingParams | None, tokens: int
) -> StreamRule | None:
    """Return the rule under the policy that a request names, if it names one.

    Args:
        rule: the server's.
        tokens: what the request may reach, prompt and longest reply.
    """
    if not isinstance(rule, StreamRule) or not rule.mixed:
        return None
    text = named_in(params)
    return None if text is None else rule_named(rule, text, tokens)


class PolicyGuard:
    """Refuses requests whose policy the server cannot honour.

    Args:
        rule: what makes plans; ``None`` for stock vLLM.
        max_tokens: the longest request that the server takes.
        pool: pages that requests can have.
    """

    def __init__(self, rule: Rule | None, max_tokens: int, pool: int) -> None:
        self._rule, self._max_tokens, self._pool = rule, max_tokens, pool

    @classmethod
    def of_engine(cls, config: VllmConfig, policy: bool) -> PolicyGuard:
        """Guard an engine of this process, which has sized its pool by now."""
        rule = rule_of(config) if policy else None
        # Page 0 is vLLM's placeholder and is never given out.
        pool = (config.cache_config.num_gpu_blocks or 0) - 1
        if rule is not None:
            pool -= scratch_of(config, rule)
        return cls(rule, config.model_config.max_model_len, pool)

    def admit(self, params: Any, prompt_tokens: int | None) -> None:
        """Let a request pass, its budget made into parameters, or refuse it.

        Args:
            params: its sampling parameters; without ``max_tokens`` the reply may be as
                long as fits.
            prompt_tokens: ``None`` if they are not known yet.

        Raises:
            UserError: one line, for whoever wrote the request.
        """
        text = named_in(params)
        if text is None:
            return
        self._check_allowed()
        assert isinstance(self._rule, StreamRule), "dense policies are not mixed"
        tokens = self._max_tokens
        if prompt_tokens is not None and params.max_tokens is not None:
            tokens = min(prompt_tokens + params.max_tokens, tokens)
        pages = rule_named(self._rule, text, tokens).most_pages(tokens)
        if pages > self._pool:
            raise UserError(
                f"{text}: a request of {tokens} tokens, prompt and reply, needs "
                f"{pages} pages, but the pool has {self._pool}; send fewer tokens, or "
                "name a policy that keeps less"
            )
        # Another request may share the dictionary.
        settled = without_budget(self._rule, str(text), tokens)
        params.extra_args = {**params.extra_args, KEY: settled}

    def remark(self, params: Any) -> str | None:
        """Say what of a reply comes from a prompt that is not compressed yet."""
        if not isinstance(self._rule, DenseRule):
            return None
        what = None
        if params.prompt_logprobs is not None:
            what = "log probabilities of the prompt are those"
        elif params.max_tokens == 1:
            what = "a reply of one token is that"
        if what is None:
            return None
        return (
            f"{what} of full attention, for policy {self._rule.policy.name} "
            "compresses a prompt once it has been read"
        )

    def admit_beams(self) -> None:
        """Let beam search pass, or refuse it.

        Every step of a beam is a request of its own: prompt and reply so far, and one
        more token. Under a policy of positions that is the same as going on.

        Raises:
            UserError: one line; the server's policy would be another one.
        """
        if self._rule is None:
            return
        policy = self._rule.policy
        if isinstance(policy, DensePolicy):
            what = "chooses what it keeps when a prompt has been read"
        elif policy.capabilities.elastic:
            what = "keeps what follows from the length of a reply"
        else:
            return
        raise UserError(
            f"policy {policy.name} {what}, but every step of beam search is a new "
            "prompt with a reply of one token; sample with n, or ask a server with "
            "another policy, such as sink-recent"
        )

    def _check_allowed(self) -> None:
        """Refuse a request that names a policy where none may.

        Raises:
            UserError: one line, for whoever wrote the request.
        """
        if self._rule is None:
            raise UserError(
                "this server runs stock vLLM (--policy none), which has no policies; "
                f"leave {KEY} out"
            )
        if not isinstance(self._rule, StreamRule) or not self._rule.mixed:
            raise UserError(
                "this server was started without --allow-request-policies; start it "
                f"with the flag, or leave {KEY} out"
            )
