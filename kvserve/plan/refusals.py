# SPDX-License-Identifier: Apache-2.0
"""What no plan can be made of, and why: of a model, a policy and how to serve it."""

from __future__ import annotations

from kvserve.errors import UserError
from policies.base import ModelShape, Policy


def check_unequal(
    policy: Policy,
    model: ModelShape,
    ranks: int,
    mixed: bool,
    protects: bool = False,
    ranges: bool = False,
) -> None:
    """Refuse what is not worked out for layers with heads of unequal number or size.

    Raises:
        UserError: names the flag and the way out.
    """
    has = f"layers of {model.name} have heads of unequal number or size"
    of_open = {
        heads
        for heads, local in zip(model.layer_heads, model.local_by_layer, strict=True)
        if local is None
    }
    if len(of_open) > 1:
        raise UserError(
            f"MODEL {model.name}: {len(of_open)} kinds of layers that see everything "
            "differ in their heads; give requests room to outgrow its windows "
            "(--max-model-len), or serve it with stock vLLM (`--policy none`)"
        )
    refused = {
        f"--tensor-parallel-size={ranks}": ranks > 1,
        "--allow-request-policies": mixed,
        "--protect": protects,
    }
    for flag, given in refused.items():
        if given:
            raise UserError(f"{flag}: {has}, which cannot have it yet; leave it out")
    if ranges:
        raise UserError(
            f"--policy {policy.name}: {has}, whose requests cannot have budgets of a "
            "range yet; give one budget"
        )
    if not policy.capabilities.position_only:
        raise UserError(
            f"--policy {policy.name}: {has}, which policies that judge tokens cannot "
            "keep yet; choose a policy of positions, such as sink-recent"
        )


def check_dense(
    policy: Policy, ranks: int, mixed: bool, protects: bool, ranges: bool
) -> None:
    """Refuse what policies that select once a prompt has been read cannot have.

    Raises:
        UserError: names the flag and the way out.
    """
    if ranges:
        raise UserError(
            f"--policy {policy.name}: holds a full cache while it reads, so a range of "
            "budgets would let no more requests in; give one budget, or choose a "
            "policy that frees as it reads, such as kvzap"
        )
    if protects:
        raise UserError(
            f"--protect: policy {policy.name} selects tokens of the whole prompt; "
            "leave the flag out, or choose a policy that frees as it reads"
        )
    if mixed and ranks > 1:
        raise UserError(
            f"--allow-request-policies: policy {policy.name} selects on each of "
            f"{ranks} ranks among its own heads, where policies cannot be mixed; leave "
            "the flag out, use --tensor-parallel-size=1, or start with a policy of "
            "positions"
        )


def check_guesses(
    policy: Policy,
    model: ModelShape,
    ranks: int,
    mixed: bool,
    protects: bool,
    ranges: bool,
) -> None:
    """Refuse what tokens that may be refused cannot be served beside.

    Raises:
        UserError: names both flags and the way out.
    """
    flag = "--speculative-config"
    if policy.capabilities.prefill == "dense":
        raise UserError(
            f"{flag}: --policy {policy.name} cannot take back what a refused token has "
            "evicted; leave one out, or choose a policy that frees as it reads, such "
            "as retrieval or kvzap"
        )
    beside = {
        f"--tensor-parallel-size={ranks}": ranks > 1,
        "--allow-request-policies": mixed,
        "--protect": protects,
        f"the range of budgets of --policy {policy.name}": ranges,
    }
    for other, given in beside.items():
        if given:
            raise UserError(f"{flag}: {other} cannot have it yet; leave one out")
    if model.layer_heads:
        raise UserError(
            f"{flag}: layers of {model.name} have heads of unequal number or size, "
            "which cannot have it yet; leave it out"
        )


def check_ranks(policy: Policy, model: ModelShape, ranks: int) -> None:
    """Refuse heads that cannot be dealt to ranks, or that must know of each other.

    Raises:
        UserError: names the flag, what is in the way and what to do.
    """
    flag = f"--tensor-parallel-size={ranks}"
    if not policy.capabilities.tensor_parallel_exact:
        raise UserError(
            f"{flag}: heads of a layer would lie on different ranks, and policy "
            f"{policy.name} compares them (its record is not tensor_parallel_exact); "
            "use 1, or another policy"
        )
    heads = model.num_kv_heads
    if heads % ranks and ranks % heads:
        raise UserError(
            f"{flag}: {model.name} has {heads} KV heads, which cannot be dealt evenly; "
            "use a number that divides them, or --data-parallel-size"
        )
    if policy.capabilities.prefill == "dense" and ranks > heads:
        raise UserError(
            f"{flag}: {model.name} has {heads} KV heads, and policy {policy.name} must "
            f"see all query heads of a KV head on one rank; use at most {heads}"
        )
