# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that the engine could not honour, in the process that takes them.

Scheduler and worker trust what got through: an error there ends the engine for all.
"""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, VllmConfig

from kvserve.engine.start.support import rule_of, scratch_of
from kvserve.errors import UserError
from kvserve.extra_args import (
    FORCED_PROCESSOR,
    FORCED_TOKENS,
    POLICY,
    PROTECT,
    said_in,
)
from kvserve.plan.mixed import MixedRule
from kvserve.plan.request_policies import rule_of_request, without_budget
from kvserve.plan.rule import Rule
from policies.base import Policy


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
        text, spans = said_in(params, POLICY), said_in(params, PROTECT)
        if text is None and spans is None:
            return
        if text is not None:
            self._mixed_rule()
        if spans is not None:
            self._protecting_rule()
        tokens = self._max_tokens
        if prompt_tokens is not None and params.max_tokens is not None:
            tokens = min(prompt_tokens + params.max_tokens, tokens)
        assert self._rule is not None
        own = rule_of_request(self._rule, params, tokens)
        pages = (own or self._rule).most_pages(tokens)
        if pages > self._pool:
            raise UserError(
                f"{text or spans}: a request of {tokens} tokens, prompt and reply, "
                f"needs {pages} pages, but the pool has {self._pool}; send fewer "
                "tokens, or ask to keep less"
            )
        if text is not None:
            # Another request may share the dictionary.
            settled = without_budget(self._mixed_rule(), str(text), tokens)
            params.extra_args = {**params.extra_args, POLICY: settled}

    def remark(self, params: Any) -> str | None:
        """Say what of a reply comes from a prompt that is not compressed yet."""
        policy = self._policy_of(params)
        if policy is None or policy.capabilities.prefill != "dense":
            return None
        what = None
        if params.prompt_logprobs is not None:
            what = "log probabilities of the prompt are those"
        elif params.max_tokens == 1:
            what = "a reply of one token is that"
        if what is None:
            return None
        return (
            f"{what} of full attention, for policy {policy.name} "
            "compresses a prompt once it has been read"
        )

    def _policy_of(self, params: Any) -> Policy | None:
        """The policy of a request that was let pass."""
        if self._rule is None:
            return None
        named = rule_of_request(self._rule, params, self._max_tokens)
        return (named or self._rule).policy

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
        if policy.capabilities.prefill == "dense":
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

    def _mixed_rule(self) -> MixedRule:
        """The rule that takes a request which names a policy, where one may.

        Raises:
            UserError: one line, for whoever wrote the request.
        """
        if self._rule is None:
            raise UserError(
                "this server runs stock vLLM (--policy none), which has no policies; "
                f"leave {POLICY} out"
            )
        if not (isinstance(self._rule, MixedRule) and self._rule.mixed):
            raise UserError(
                "this server was started without --allow-request-policies; start it "
                f"with the flag, or leave {POLICY} out"
            )
        return self._rule

    def _protecting_rule(self) -> None:
        """Refuse a request that has tokens protected where none may.

        Raises:
            UserError: one line, for whoever wrote the request.
        """
        if self._rule is None:
            raise UserError(
                "this server runs stock vLLM (--policy none), which evicts nothing; "
                f"leave {PROTECT} out"
            )
        if not (isinstance(self._rule, MixedRule) and self._rule.protects):
            raise UserError(
                "this server was started without --protect; start it with `--protect "
                f"requests`, or leave {PROTECT} out"
            )


def check_forced(params: Any, model: ModelConfig) -> None:
    """Refuse tokens that cannot be forced, before the engine sees them.

    The processor itself cannot: it is asked without the model's vocabulary, and an
    error while it runs would end the engine for everybody.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    forced = said_in(params, FORCED_TOKENS)
    if forced is None:
        return
    loaded = {_path_of(one) for one in model.logits_processors or []}
    if FORCED_PROCESSOR not in loaded:
        raise UserError(
            "this server forces no tokens; start it with `--logits-processors "
            f"{FORCED_PROCESSOR}`, or leave the field out"
        )
    check_token_ids(params)
    most, vocabulary = params.max_tokens or model.max_model_len, model.get_vocab_size()
    if len(forced) > most:
        raise UserError(
            f"{len(forced)} tokens are more than the reply's {most}; raise max_tokens, "
            "or name fewer"
        )
    beyond = [token for token in forced if token >= vocabulary]
    if beyond:
        raise UserError(
            f"{beyond[0]} is no token: the vocabulary has {vocabulary}, from 0 on"
        )
    if params.structured_outputs is not None:
        raise UserError(
            "tokens cannot be forced beside structured outputs; leave one of them out"
        )


def check_token_ids(params: Any) -> None:
    """Refuse what is no list of token ids.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    forced = said_in(params, FORCED_TOKENS)
    if forced is None:
        return
    whole = isinstance(forced, list) and all(type(token) is int for token in forced)
    if not whole or any(token < 0 for token in forced):
        raise UserError("expected a list of token ids, whole numbers from 0 on")


def _path_of(processor: Any) -> str:
    """vLLM takes a logits processor by its path or as a class."""
    if isinstance(processor, str):
        return processor
    return f"{processor.__module__}:{processor.__qualname__}"
