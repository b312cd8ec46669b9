# SPDX-License-Identifier: Apache-2.0
"""One way to write a policy, ``NAME:key=value,...``, and a budget for each of them.

``NAME:budget=0.25`` keeps a quarter of the entries of a request, ``NAME:budget=512``
as many as 512 tokens have in every head. A server may have a range of them,
``NAME:budget=50%..12.5%``, of which each request gets what there is room for.

Policies have parameters of their own for it; ``RULES`` says which, and how they are set
for a request of ``N`` tokens. Tokens are rounded down to whole pages, so that no policy
gets more than its share.

Every command, the Python API and a request's ``kv_policy`` read policies here. A
server takes the longest request it serves for ``N``, ``kvserve eval`` the length it
measures, a request its own prompt and longest reply.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kvserve.errors import UserError
from policies.base import DensePolicy, HeadBudget, ModelShape, Policy, StreamingPolicy
from policies.registry import (
    available_policies,
    create_policy,
    parse_arguments,
    read_policy,
)
from policies.shares import Budget, levels_between, parse_range

PAGE = 32
SINKS = 32
LEAST = 64
Arguments = dict[str, Any]

RULES = {
    "full": "",
    "sink-recent": f"sinks={SINKS}, recent=s·N-{SINKS}",
    "retrieval": "full_ratio=0.2, less where others would keep fewer recent tokens "
    f"than N/12 or {LEAST}; sinks={SINKS}, recent fills",
    "snapkv": "capacity=s·N",
    "h2o": "heavy_ratio=recent_ratio=s/2",
    "heterogeneous": "budget=s",
    "moa": "budget=s where the plan has it, else length so that spans are s·N",
    "expected-attention": "budget=s, length=N",
    "keydiff": "budget=s, length=N",
    "kvzap": "budget=s, length=N",
    "knorm": "budget=s, length=N",
    "sharded": "stride=2/s, local_blocks fill; model not trained for it",
}


@dataclass(frozen=True)
class PolicySpec:
    """A policy as typed: ``NAME`` or ``NAME:key=value,key=value``.

    Attributes:
        text: as it was typed; names the policy in reports.
        name: the policy's name, also where a TOML file was typed.
        own: parameters given by their own names, which overrule the budget's.
        budget: what ``budget=`` said; of a range, the largest.
        least: of a range ``50%..12.5%``, the least.
        from_file: what the TOML file sets, which the budget's overrule.
    """

    text: str
    name: str
    own: tuple[tuple[str, Any], ...] = ()
    budget: Budget | None = None
    from_file: tuple[tuple[str, Any], ...] = ()
    least: Budget | None = None

    @classmethod
    def parse(
        cls, text: str, arguments: Mapping[str, Any] = MappingProxyType({})
    ) -> PolicySpec:
        """Read a policy.

        Args:
            arguments: parameters given besides, as by ``--policy-arg``; values may be
                strings.

        Raises:
            UserError: unknown policy, malformed parameters or budget.
        """
        typed, pairs = split_policy(text)
        own: dict[str, Any] = {**parse_arguments(pairs, f"--policy {typed}:")}
        for key in arguments:
            if key in own:
                raise UserError(f"--policy-arg {key}: --policy {text} sets it as well")
        own |= arguments
        name, from_file = read_policy(typed)
        budget = from_file.pop("budget", None)
        budget = own.pop("budget", budget)
        create_policy(name, {**from_file, **own})
        ends = (None, None) if budget is None else parse_range(str(budget))
        given = tuple(own.items()), ends[0], tuple(from_file.items()), ends[1]
        return cls(text, name, *given)

    @property
    def rule(self) -> str:
        """The name under which ``RULES`` lists the policy: not an alias."""
        return available_policies()[self.name].name

    @property
    def levels(self) -> tuple[PolicySpec, ...]:
        """The policy with each budget of a range, the largest first.

        Each is at most the square root of two times the next, but for rounding.
        """
        if self.budget is None or self.least is None:
            return (self,)
        budgets = levels_between(self.budget, self.least)
        return tuple(
            dataclasses.replace(self, budget=budget, least=None) for budget in budgets
        )

    def refuse_range(self, why: str) -> None:
        """Refuse a range of budgets where there must be one.

        Raises:
            UserError: says why, and what to give.
        """
        if self.least is not None:
            raise UserError(f"--policy {self.text}: {why}; give one budget")

    def with_share(self, share: float) -> PolicySpec:
        """The same policy with another budget."""
        typed, _ = split_policy(self.text)
        parts = [*(f"{key}={value}" for key, value in self.own), f"budget={share:g}"]
        text = f"{typed}:{','.join(parts)}"
        budget = Budget(share=share)
        return dataclasses.replace(self, text=text, budget=budget, least=None)

    def arguments(self, length: int, model: ModelShape) -> Arguments:
        """Parameters of the policy for requests of ``length`` tokens.

        A budget is of the layers that a policy decides on; where there are none, it
        says nothing.

        Raises:
            UserError: the policy cannot have this budget, or serve this model.
        """
        given: Arguments = {**dict(self.from_file), **dict(self.own)}
        arguments, model = given, model.open
        if not model.num_layers:
            return given
        if self.budget is not None:
            share = self.budget.share_of(length)
            try:
                translated = arguments_for(self.rule, share, length, model, given)
            except UserError as error:
                flag = rf"--policy( {self.rule}:|-arg) "
                message = re.sub(f"^{flag}", "", str(error))
                raise UserError(f"--policy {self.text}: {message}") from None
            arguments = {**given, **translated, **dict(self.own)}
        shape = dataclasses.replace(model, max_tokens=max(length, 1))
        _check(create_policy(self.name, arguments), shape, length)
        return arguments

    def without_budget(self) -> Policy:
        """The policy as far as it is known before the model: its kind and record."""
        return create_policy(self.name, {**dict(self.from_file), **dict(self.own)})

    def create(self, model: ModelShape) -> Policy:
        """The policy of a server, whose longest request a budget is a share of.

        Raises:
            UserError: the policy cannot have this budget.
        """
        if self.budget is None:
            return self.without_budget()
        return create_policy(self.name, self.arguments(model.max_tokens, model))


def split_policy(text: str) -> tuple[str, list[str]]:
    """Split ``NAME:key=value,key=value``, or ``FILE.toml:...``, at colon and commas."""
    # A colon may be a part of a file's path; one before a parameter is not.
    name, rest = text, ""
    if not text.endswith(".toml") or "=" in text:
        name, _, rest = text.partition(":")
    return name, [pair for pair in rest.split(",") if pair]


def split_policies(text: str) -> list[str]:
    """Split a list of policies, ``none,h2o:budget=25%,norm=count,full``, at commas.

    A ``key=value`` behind a comma belongs to the policy before it.
    """
    policies: list[str] = []
    for part in text.split(","):
        if policies and re.fullmatch(r"\w+=.*", part):
            policies[-1] += f",{part}"
        else:
            policies.append(part)
    return policies


def arguments_for(
    policy: str,
    share: float,
    length: int,
    model: ModelShape,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> Arguments:
    """Parameters by which a policy keeps ``share`` of a request, as ``RULES`` says.

    All that is not here is as the policy ships it.

    Args:
        length: tokens of the request, prompt and reply.
        own: parameters that were given besides, such as a plan's file.

    Raises:
        UserError: the policy has no such budget.
    """
    match policy:
        case "full":
            return _everything(share)
        case "sink-recent":
            return _sink_recent(share, length)
        case "retrieval":
            return _retrieval(share, length, model.num_layers * model.num_kv_heads)
        case "snapkv":
            return {"capacity": _at_least(LEAST, share, length)}
        case "h2o":
            return {"heavy_ratio": share / 2, "recent_ratio": share / 2}
        case "heterogeneous":
            return {"budget": share}
        case "moa":
            return _moa(share, length, model, own)
        case "sharded":
            return _sharded(share, length)
        case _:
            return _by_field(policy, share, length)


def whole(tokens: float, unit: int = PAGE) -> int:
    """Round down to whole pages, so that no policy gets more than its share."""
    return max(int(tokens / unit), 1) * unit


def _at_least(least: int, share: float, length: int) -> int:
    tokens = whole(share * length)
    if tokens < least:
        raise UserError(
            f"{share:.3g} of {length} tokens is less than the {least} tokens that a "
            "head needs; give a larger budget"
        )
    return tokens


def _everything(share: float) -> Arguments:
    if share < 1:
        raise UserError("it keeps everything and takes no budget; leave budget= out")
    return {}


def _sink_recent(share: float, length: int) -> Arguments:
    kept = _at_least(SINKS + PAGE, share, length)
    return {"sinks": SINKS, "recent": kept - SINKS}


def _retrieval(share: float, length: int, heads: int) -> Arguments:
    """Keep a fifth of the heads full, or as many as leave the others a window.

    A twelfth of the request: with less, needles at the start of 4096 tokens were lost
    under a quarter of the cache, whatever the number of full heads.
    """
    window = max(LEAST, length // 12)
    for full in range(round(0.2 * heads), -1, -1):
        rest = (share * heads - full) * length / (heads - full)
        if rest >= SINKS + window:
            break
    _at_least(SINKS + PAGE, rest / length, length)
    recent = whole(rest - SINKS)
    return {"full_ratio": round(full / heads, 4), "sinks": SINKS, "recent": recent}


def _moa(
    share: float, length: int, model: ModelShape, own: Mapping[str, Any]
) -> Arguments:
    """Choose the plan of this budget, or make the default plan's spans shorter.

    MoA's spans follow from a length, which ``length`` sets: that of a shorter request
    gives any smaller budget with the same shares between heads.
    """
    shape = dataclasses.replace(model, max_tokens=length)
    exact: Arguments = {"budget": share}
    try:
        _check(create_policy("moa", {**own, **exact}), shape, length)
    except UserError as error:
        # Plans need not keep more for a longer request, so each length is tried; where
        # there are many, every few pages.
        step = max(length // LEAST // 64, 1) * LEAST
        for made_for in range(length // LEAST * LEAST, 2 * LEAST - 1, -step):
            policy = create_policy("moa", {**own, "length": made_for})
            if _kept_share(policy, shape, length) <= share:
                return {"length": made_for}
        raise UserError(str(error)) from None
    return exact


def _sharded(share: float, length: int) -> Arguments:
    block = 2 * PAGE
    stride = min(round(2 / share), 64)
    local = (share - 1 / stride) / (1 - 1 / stride) * length
    return {
        "stride": stride,
        "local_blocks": whole(local, block) // block,
        "insist": True,
    }


def _by_field(policy: str, share: float, length: int) -> Arguments:
    """Policies that thin, or of other packages: by a parameter whose name tells."""
    fields = {field.name for field in dataclasses.fields(create_policy(policy))}
    if "budget" in fields:
        of_length = {"length": length} if "length" in fields else {}
        return {"budget": share, **of_length}
    if "capacity" in fields:
        return {"capacity": whole(share * length)}
    raise UserError(
        "has neither a parameter `budget` (a share) nor `capacity` (tokens) that a "
        "budget could set; give its own parameters instead"
    )


def _check(policy: Policy, model: ModelShape, length: int) -> None:
    """Let the policy refuse a model or a length that it cannot serve."""
    if isinstance(policy, StreamingPolicy):
        policy.budgets(model, length)
    elif isinstance(policy, DensePolicy):
        policy.lanes(model, length)


def _kept_share(policy: Policy, model: ModelShape, length: int) -> float:
    assert isinstance(policy, StreamingPolicy)
    heads = [head for layer in policy.budgets(model, length) for head in layer]
    return sum(_kept(head, length) for head in heads) / (len(heads) * length)


def _kept(head: HeadBudget, length: int) -> int:
    if head.recent is None:
        return length
    held = min(head.sinks + head.recent, length)
    return held + (length - held) * head.keep // max(head.group, 1)
