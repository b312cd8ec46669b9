# SPDX-License-Identifier: Apache-2.0
"""What a request may name: a policy of its own, ``NAME[:KEY=VALUE,...]``.

A client types it, so a request may set numbers and switches alone: a text could name
a file, and no client makes a server read one. What a request cannot set is as the
server was started, if it was started with the same policy, else the default.

Scheduler and worker each make the rule from the same text.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from kvserve.errors import UserError
from kvserve.extra_args import LEVEL, POLICY, PROTECT, said_in
from kvserve.plan.mixed import MixedRule
from kvserve.plan.protection import parse_spans, protecting
from kvserve.plan.rule import Rule
from kvserve.plan.streaming import StreamRule
from policies.base import Policy
from policies.budgets import PolicySpec, split_policy
from policies.files import follows_files
from policies.registry import available_policies, create_policy, parse_arguments
from policies.thinning import ThinningPolicy

_LONGEST_TEXT = 200
_NUMBERS = {int, float, bool, NoneType}


def rule_named(rule: MixedRule, text: object, tokens: int) -> Rule:
    """Return the rule of a request that names a policy.

    Args:
        rule: the server's.
        text: what the request says.
        tokens: what the request may reach, prompt and longest reply.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_TEXT:
        raise UserError(
            "expected a text NAME[:KEY=VALUE,...] of at most "
            f"{_LONGEST_TEXT} characters, such as sink-recent:recent=480"
        )
    try:
        spec = _parse(text)
        length = max(min(tokens, rule.max_tokens), 1)
        named = _under(rule, spec, None if spec.budget is None else length)
        named.plan(tokens)
    except UserError as error:
        raise UserError(_for_clients(str(error))) from None
    except (ArithmeticError, TypeError, ValueError) as error:
        # Numbers that no policy was written for are the client's mistake.
        raise UserError(f"{text}: cannot be planned ({error})") from None
    return named


def rule_of_request(rule: Rule, params: Any, tokens: int) -> Rule | None:
    """Return the rule of a request, if it is not the server's.

    Args:
        rule: the server's.
        params: the request's sampling parameters.
        tokens: what the request may reach, prompt and longest reply.

    Raises:
        UserError: one line, for whoever wrote the request.
    """
    if not isinstance(rule, MixedRule):
        return None
    text, spans = said_in(params, POLICY), said_in(params, PROTECT)
    named: Rule | None = None
    if text is not None and rule.mixed:
        named = rule_named(rule, text, tokens)
    elif rule.levels:
        named = rule.levels[level_of(rule, params)]
    if spans is None or not rule.protects:
        return named
    own = named or rule.default
    if not isinstance(own, StreamRule):
        raise UserError(
            f"policy {own.policy.name} selects tokens of the whole prompt and protects "
            "none; name a policy that frees as it reads"
        )
    return protecting(own, parse_spans(spans))


def names_policy(rule: MixedRule, params: Any) -> bool:
    """Whether a request has a policy of its own, and no budget of the server's."""
    return rule.mixed and said_in(params, POLICY) is not None


def level_of(rule: MixedRule, params: Any) -> int:
    """Which budget of the server's range a request has: the least until it is told."""
    level, last = said_in(params, LEVEL), len(rule.levels) - 1
    # Clients may write what they like.
    return level if isinstance(level, int) and 0 <= level < last else last


def without_budget(rule: MixedRule, text: str, tokens: int) -> str:
    """Write parameters for the budget that a request names.

    What is left follows from the text alone, so that nobody who reads it later can take
    the request for longer or shorter.

    Raises:
        UserError: as :func:`rule_named`.
    """
    policy, spec = rule_named(rule, text, tokens).policy, _parse(text)
    if spec.budget is None:
        return text
    numbers = {
        key: getattr(policy, key)
        for key, hint in _hints(type(policy)).items()
        if _is_number(hint)
    }
    pairs = [f"{key}={value}" for key, value in numbers.items() if value is not None]
    settled = f"{spec.name}:{','.join(pairs)}"
    # Nobody behind asks whether a text can be read: an error there ends the engine.
    if rule_named(rule, settled, tokens).policy != policy:
        raise UserError(f"{text}: its budget cannot be written as parameters")
    return settled


@lru_cache(maxsize=256)
def _parse(text: str) -> PolicySpec:
    """Read a policy, without looking at any file."""
    name, pairs = split_policy(text)
    known = available_policies()
    if name not in known:
        names = [n for n, of in known.items() if not issubclass(of, ThinningPolicy)]
        raise UserError(f"{name!r}: is no policy; name one of {', '.join(names)}")
    cls = known[name]
    hints = _hints(cls)
    for key in parse_arguments(pairs):
        if key in hints and not _is_number(hints[key]):
            raise UserError(
                f"{key}: a request sets numbers and switches alone, for {key} could "
                "name a file; it is the server's"
            )
    spec = PolicySpec.parse(text)
    spec.refuse_range("a range of budgets is a server's")
    return spec


@follows_files
@lru_cache(maxsize=256)
def _under(rule: MixedRule, spec: PolicySpec, length: int | None) -> Rule:
    """Make the rule of a policy; ``length`` is of a request that names a budget."""
    kept = _of_server(rule.policy, available_policies()[spec.name])
    arguments: dict[str, Any] = {**kept, **dict(spec.own)}
    if length is not None:
        whole = dataclasses.replace(spec, own=tuple(arguments.items()))
        arguments = whole.arguments(length, rule.model.open)
    policy = create_policy(spec.name, arguments)
    _check(rule, policy)
    return rule.under(policy)


def _of_server(policy: Policy, cls: type[Policy]) -> dict[str, Any]:
    """What the server was started with and a request cannot set."""
    if type(policy) is not cls:
        return {}
    fixed = [key for key, hint in _hints(cls).items() if not _is_number(hint)]
    return {key: getattr(policy, key) for key in fixed}


def _check(rule: MixedRule, policy: Policy) -> None:
    """Refuse what cannot share tables and ranks with the server's policy."""
    if policy.page_size not in (None, rule.page_size):
        raise UserError(
            f"{policy.name}: thinks in blocks of {policy.page_size} tokens, but pages "
            f"of this server hold {rule.page_size}"
        )
    if rule.ranks > 1 and not policy.capabilities.tensor_parallel_exact:
        raise UserError(
            f"{policy.name}: compares heads of a layer, which lie on {rule.ranks} "
            "ranks of this server"
        )


@lru_cache(maxsize=64)
def _hints(cls: type[Policy]) -> dict[str, Any]:
    """The type of each parameter."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_number(hint: Any) -> bool:
    return {*(get_args(hint) or (hint,))} <= _NUMBERS


def _for_clients(message: str) -> str:
    """Leave out what only the command line can set."""
    message = re.sub(r"(^|`)--policy(-arg)?:? ", r"\1", message)
    if "=FILE`" in message:
        message += "; the server has to be started so, a request cannot name a file"
    return message
