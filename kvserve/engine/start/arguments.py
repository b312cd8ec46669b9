# SPDX-License-Identifier: Apache-2.0
"""The flags by which ``serve`` and ``plan`` are told a policy, and what they mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kvserve.engine.settings import PolicySettings
from kvserve.errors import UserError
from kvserve.profiling.fast import profile_arguments
from policies.head_scores import has_shipped_profile
from policies.registry import STOCK, parse_arguments


def add_policy_arguments(
    parser: argparse.ArgumentParser, several: bool = False
) -> None:
    """Add ``--policy``, which ``several`` lets be given again, and ``--policy-arg``."""
    group = parser.add_argument_group("kvserve", "Per-head KV-cache policy")
    again = "; give it again to compare" if several else ""
    group.add_argument(
        "--policy",
        action="append" if several else "store",
        default=None,
        metavar="NAME[:KEY=VALUE,...]|FILE.toml",
        help="cache policy, a TOML file that sets one, or `none` for stock vLLM; "
        "besides its own parameters every policy takes budget=25%% (of the KV entries "
        "of the longest request) or budget=512 (tokens), and those that free as they "
        "read a range, budget=50%%..12.5%%: each request gets as much as there is room "
        "for; see `kvserve policies`. "
        f"Default: `retrieval` where a profile ships for the model, else `full`{again}",
    )
    group.add_argument(
        "--policy-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a parameter of the policy; may be given several times",
    )


def add_request_policies(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-request-policies`` and ``--protect``."""
    group = parser.add_argument_group("kvserve requests", "What a request may ask for")
    group.add_argument(
        "--allow-request-policies",
        action="store_true",
        help="let a request name a policy of its own in its body: "
        '"vllm_xargs": {"kv_policy": "full"} or {"kv_policy": '
        '"sink-recent:recent=480"}. The pool must hold the longest request under '
        "`full` (default: a request that names one gets 400)",
    )
    group.add_argument(
        "--protect",
        choices=["system", "requests"],
        default="",
        help="let a request have tokens protected from eviction: "
        '"vllm_xargs": {"kv_protect": "system"}, its system prompt, or {"kv_protect": '
        '"0-200,950-1000"}, tokens by position. `system` protects the system prompts '
        "of all chats that say nothing else (default: such a request gets 400)",
    )


def choose_policy(
    policy: str | None, policy_args: list[str], model: str, measure: bool = True
) -> PolicySettings | None:
    """Settle the policy; ``None`` means stock vLLM.

    Args:
        measure: make the profile that the policy needs and nobody has made.
    """
    arguments: dict[str, Any] = {**parse_arguments(policy_args)}
    if policy == STOCK:
        if arguments:
            raise UserError("--policy-arg: --policy none takes no arguments")
        return None
    if policy is None:
        policy = "retrieval" if has_shipped_profile(Path(model).name) else "full"
        if policy == "full":
            print(
                f"kvserve: no profile ships for {Path(model).name}: policy full, "
                "which evicts nothing; to compress, give --policy retrieval, which "
                "measures the model once, or --policy sink-recent:budget=25%",
                file=sys.stderr,
            )
    # Refuses typing mistakes before anything is loaded.
    settled = profile_arguments(policy, arguments, model, make=measure)
    return PolicySettings(policy, settled)
