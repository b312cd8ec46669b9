# SPDX-License-Identifier: Apache-2.0
"""What an evaluation must know of a model before any engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from kvserve.engine.start.layers import model_shape_of
from kvserve.errors import UserError
from kvserve.models import resolve_model
from policies.base import ModelShape


@dataclass(frozen=True)
class EvaluatedModel:
    """A model by its directory or hub name.

    Attributes:
        path: what engines load.
        shape: layers and heads.
        limit: tokens of the longest request, prompt and reply.
        tokenizer: a fast tokenizer of ``transformers``.
        weights: bytes of its weight files, to tell it from another of the same name;
            0 for a model that is not a local directory.
    """

    path: str
    shape: ModelShape
    limit: int
    tokenizer: Any
    weights: int

    @property
    def name(self) -> str:
        return self.shape.name


def load_model(model: str | None) -> EvaluatedModel:
    """Read configuration and tokenizer; ``None`` is the embedded model.

    Raises:
        UserError: there is no such model, or its tokenizer is not fast.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model)
    config = read_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"MODEL {path}: its tokenizer has no fast version, which prompts of an "
            "exact length need"
        )
    files = Path(path).glob("*.safetensors")
    return EvaluatedModel(
        path,
        shape_of(path),
        int(getattr(config, "max_position_embeddings", 0) or 1 << 20),
        tokenizer,
        sum(file.stat().st_size for file in files),
    )


def read_config(path: str) -> Any:
    """Read the configuration of the language model at ``path``."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def shape_of(path: str) -> ModelShape:
    """Read layers and heads of a model, as an engine would plan for them.

    Raises:
        UserError: no engine can be configured for it.
    """
    try:
        return model_shape_of(EngineArgs(model=path).create_engine_config())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"MODEL {path}: cannot be loaded ({reason})")
