# SPDX-License-Identifier: Apache-2.0
"""How much repeating a text looks at each of its tokens: KVzip's scores.

Source: KVzip (arXiv 2505.23416, section 3.2). A model reads a text, is asked to repeat
it, and its reply is the text, given word for word. A token's score in a KV head is the
most attention that any query of the repetition pays to it, over the query heads of
its group: what nobody needs to say the text again, hardly any question will need.

Where we differ: a text is short enough to be repeated at once, and the scores are for
learning from, not for serving. Weighing them by how hard each token was to foretell at
the first reading made answers worse.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvserve.errors import UserError
from kvserve.profiling.attention_hook import PlainAttention
from kvserve.texts.haystack import insert, passage
from kvserve.texts.needles import Family, chat, encode, fit

_INSTRUCTION = "Repeat the text above word for word."
_ROWS = 256


@dataclass(frozen=True)
class Repetition:
    """A text that is read, and the reply that repeats it.

    Attributes:
        token_ids: The prompt, then the repetition.
        text: ``[start, end)`` of the text in the prompt.
        reply: Where the repetition begins.
    """

    token_ids: list[int]
    text: tuple[int, int]
    reply: int


@dataclass(frozen=True)
class Reading:
    """What one layer made of the text, and what repeating it looked at.

    Attributes:
        queries: Before rotation, of the prompt, ``[H_q, n, d]``, float32.
        keys, values: Likewise, ``[H_kv, n, d]``.
        scores: Most attention that the repetition pays, ``[H_kv, n]``, float32.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor


def build_repetition(
    tokenizer: Any, family: Family, num_tokens: int, facts: int, seed: str, text: str
) -> Repetition:
    """Hide ``facts`` needles in prose of about ``num_tokens`` tokens, and repeat it.

    Args:
        num_tokens: Of the prompt; the whole is nearly twice as long.
        seed: Draws the needles, the passage and the depths.
        text: Prose to hide the needles in.

    Raises:
        UserError: ``num_tokens`` leaves no room for prose.
    """
    rng = random.Random(seed)
    needles = [family.needle(rng.randrange(1 << 20)) for _ in range(facts)]
    prose = passage(text, rng.random(), 8 * num_tokens)
    depths = [(number + rng.random()) / facts for number in range(facts)]

    def render(hidden: str) -> _Prompt:
        # The deepest goes in first, so that it does not shift the others.
        for needle, depth in reversed(list(zip(needles, depths, strict=True))):
            hidden, _ = insert(hidden, needle.sentence, depth)
        prompt = chat(tokenizer, f"{hidden}\n\n{_INSTRUCTION}")
        return _Prompt(encode(tokenizer, prompt)[0], prompt, hidden)

    prompt = fit(tokenizer, prose, num_tokens, render)
    if prompt is None:
        raise UserError(f"{facts} facts do not fit in {num_tokens} tokens")
    return repeat(tokenizer, prompt.rendered, prompt.text)


@dataclass(frozen=True)
class _Prompt:
    token_ids: list[int]
    rendered: str
    text: str


def repeat(tokenizer: Any, rendered: str, text: str) -> Repetition:
    """Have the prompt ``rendered`` be answered by the ``text`` that is in it."""
    token_ids, offsets = encode(tokenizer, rendered + text)
    first = rendered.index(text)
    inside = [
        index
        for index, (begin, end) in enumerate(offsets)
        if begin < first + len(text) and end > first
    ]
    reply = next(i for i, (_, end) in enumerate(offsets) if end > len(rendered))
    return Repetition(token_ids, (inside[0], inside[-1] + 1), reply)


class RepetitionProbe(PlainAttention):
    """Causal attention that notes the most that a repetition pays to each token.

    Attributes:
        reply: Query from which the repetition begins; scores are for those before.
        readings: What each layer saw; complete after the forward pass, but for layers
            with a window of their own.
    """

    name = "kvserve_repetition"

    def __init__(self) -> None:
        super().__init__()
        self.reply = 0
        self.readings: dict[int, Reading] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        output = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            is_causal=True,
            scale=scale,
        )
        self.readings[layer] = Reading(
            self.plain("q", layer, query)[:, : self.reply],
            self.plain("k", layer, key)[:, : self.reply],
            value[0, :, : self.reply],
            most_attention(query[0] * scale, key[0], self.reply),
        )
        return output


def most_attention(query: Tensor, key: Tensor, reply: int) -> Tensor:
    """Return the most attention that queries from ``reply`` on pay, ``[H_kv, reply]``.

    Args:
        query: Scaled, ``[H_q, n, d]``.
        key: ``[H_kv, n, d]``.
    """
    grouped = query.view(len(key), -1, *query.shape[1:])
    most = torch.zeros(len(key), reply, device=key.device)
    for first in range(reply, query.shape[1], _ROWS):
        rows = grouped[:, :, first : first + _ROWS]
        last = first + rows.shape[2]
        logits = rows @ key[:, None, :last].transpose(2, 3)
        own = torch.ones(last - first, last - first, dtype=torch.bool)
        future = own.triu(1).to(key.device)
        logits[..., first:].masked_fill_(future, float("-inf"))
        weights = logits.softmax(-1)[..., :reply]
        most = torch.maximum(most, weights.amax((1, 2)))
    return most


def read_and_repeat(
    model: Any, probe: RepetitionProbe, repetition: Repetition
) -> list[Reading]:
    """Return what each layer saw in the prompt, and what repeating it looked at.

    Args:
        probe: Attached to ``model``.
    """
    probe.reply = repetition.reply
    probe.readings.clear()
    tokens = torch.tensor([repetition.token_ids], device=model.device)
    with torch.inference_mode():
        model(tokens, use_cache=False, logits_to_keep=1)
    return [probe.readings[layer] for layer in sorted(probe.readings)]
