# SPDX-License-Identifier: Apache-2.0
"""kvserve: per-head KV-cache budgets inside vLLM.

>>> from kvserve import LLM
>>> llm = LLM(policy="retrieval", policy_args={"full_ratio": 0.2})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvserve.errors import UserError
from kvserve.version import __version__

if TYPE_CHECKING:
    from kvserve.engine.start.llm import LLM

__all__ = ["LLM", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    # vLLM takes seconds to import: only those who serve pay for it.
    if name == "LLM":
        from kvserve.engine.start.llm import LLM

        return LLM
    raise AttributeError(f"module 'kvserve' has no attribute {name!r}")
