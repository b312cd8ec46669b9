# SPDX-License-Identifier: Apache-2.0
"""What is measured: policies that run here, and servers that run elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvserve.errors import UserError
from kvserve.evaluation.backend import AT_ONCE, Backend
from kvserve.evaluation.model import EvaluatedModel
from kvserve.evaluation.remote import Server, ServerBackend
from policies.base import ModelShape
from policies.budgets import PAGE, Arguments, PolicySpec

_MOST_MEMORY = 4 << 30
_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES = tuple(_VALUE_BYTES)


@dataclass(frozen=True)
class LocalEngine:
    """How engines are started in this process.

    Attributes:
        longest: tokens of the longest request, prompt and reply.
        kv_memory: bytes of the pool; ``None`` is room for all requests that run
            together, each with a full cache, up to 4 GiB.
        kv_cache_dtype: what pages hold, as vLLM's option says.
        protect: spare the system prompts of all requests.
    """

    model: EvaluatedModel
    dtype: str
    longest: int
    kv_memory: int | None = None
    kv_cache_dtype: str = "auto"
    protect: bool = False

    @property
    def shape(self) -> ModelShape:
        """The model as the engine sees it, which takes no longer requests."""
        return self.model.shape.up_to(self.longest)

    def pool(self) -> int:
        if self.kv_memory is not None:
            return self.kv_memory
        shape = self.model.shape
        heads = shape.num_layers * shape.num_kv_heads
        head = 2 * shape.head_size * _VALUE_BYTES[self.dtype]
        request = (self.longest + 2 * PAGE) * heads * head
        # A step's scratch pages, of one layer, come on top.
        scratch = 4096 * shape.num_kv_heads * head
        return max(min(AT_ONCE * request, _MOST_MEMORY), request) + scratch


@dataclass(frozen=True)
class PolicyContender:
    """A policy, run in this process.

    Attributes:
        without: lengths at which it is not measured.
    """

    spec: PolicySpec
    engine: LocalEngine
    without: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return self.spec.text

    def can(self, length: int) -> bool:
        return length not in self.without

    def arguments(self, length: int) -> Arguments:
        """The policy's parameters, of which a budget may depend on the length."""
        return self.spec.arguments(length, self.engine.shape)

    def open(self, arguments: Arguments) -> Backend:
        from kvserve.evaluation.engine import EngineBackend

        return EngineBackend(
            self.engine.model.path,
            self.spec.name,
            arguments,
            longest=self.engine.longest,
            dtype=self.engine.dtype,
            kv_memory=self.engine.pool(),
            kv_cache_dtype=self.engine.kv_cache_dtype,
            protect=self.engine.protect,
        )


@dataclass(frozen=True)
class ServerContender:
    """A running server under whatever policy it was started with."""

    name: str
    server: Server
    tokenizer: Any

    @classmethod
    def parse(cls, text: str, model: EvaluatedModel, longest: int) -> ServerContender:
        """Read ``URL`` or ``NAME=URL``, and look at the server.

        Raises:
            UserError: no server answers, it serves another model, or not so long.
        """
        name, separator, url = text.partition("=")
        if not separator or "/" in name:
            name, url = "server", text
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--url {text}: expected http://HOST:PORT, or NAME=URL")
        server = Server.reach(url)
        server.check(model, longest)
        return cls(name, server, model.tokenizer)

    def can(self, length: int) -> bool:
        return True

    def arguments(self, length: int) -> Arguments:
        return {"url": self.server.url}

    def open(self, arguments: Arguments) -> Backend:
        return ServerBackend(self.server, self.tokenizer)
