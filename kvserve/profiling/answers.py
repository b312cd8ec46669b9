# SPDX-License-Identifier: Apache-2.0
"""What a model answers to a recital, and how far two models' answers are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvserve.profiling.recital import Recital


def answer_log_probs(
    model: Any, recital: Recital, embedded: Tensor | None = None
) -> Tensor:
    """Return next-token log-probabilities at the answers' tokens, ``[answers, V]``.

    Args:
        embedded: ``[1, n, d]``, to read instead of the recital's tokens.
    """
    before = torch.tensor(recital.answers, device=model.device) - 1
    if embedded is None:
        asked = {"input_ids": torch.tensor([recital.token_ids], device=model.device)}
    else:
        asked = {"inputs_embeds": embedded}
    logits = model(**asked, use_cache=False, logits_to_keep=before).logits[0]
    log_probs: Tensor = logits.log_softmax(-1)
    return log_probs


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return the mean KL divergence from ``dense`` over answer tokens, in nats."""
    return functional.kl_div(other, dense, reduction="batchmean", log_target=True)


def pass_back_from_reply(model: Any, recital: Recital, seed: int) -> None:
    """Run backward from the loss of answers that the model itself has drawn.

    Args:
        seed: draws the tokens that take the answers' places.
    """
    tokens = torch.tensor([recital.token_ids], device=model.device)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    log_probs = answer_log_probs(model, recital, inputs)
    generator = torch.Generator().manual_seed(seed)
    reply = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
    loss = -log_probs.gather(1, reply.to(model.device)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
