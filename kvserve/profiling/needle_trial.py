# SPDX-License-Identifier: Apache-2.0
"""One needle, and what every head did while the model looked for it.

Two things are counted, both by the one key that a head attends to most:

* **copies** (retrieval heads, arXiv 2404.15574): at a decode step that key lies in the
  hidden answer and carries the very token that the model emits.
* **echoes** (echo heads, arXiv 2407.15891, section 3): while the question is read and
  answered, that key lies in the hidden sentence and carries the query's own token. Such
  heads find the place from which retrieval heads copy. A model whose question is read
  with every head's full cache hardly misses them at decoding; one that reads it through
  windows, as kvserve does, loses the needle without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvserve.evaluation.needles import NeedlePrompt, score

_ATTENTION = "kvserve_top_key"


@dataclass(frozen=True)
class Trial:
    """What one needle showed.

    Attributes:
        recall: Share of the answer's words that the model said.
        copies: ``[R, H_q]``: copied answer tokens over the answer's length.
        echoes: ``[R, H_q]``: share of echoes among the queries whose token occurs in
            the hidden sentence.
    """

    recall: float
    copies: Tensor
    echoes: Tensor

    def to_json(self, key: str) -> str:
        copies, echoes = self.copies.tolist(), self.echoes.tolist()
        record = {"prompt": key, "recall": self.recall}
        return json.dumps({**record, "copies": copies, "echoes": echoes})

    @classmethod
    def from_json(cls, line: str) -> tuple[str, Trial]:
        record = json.loads(line)
        scores = (torch.tensor(record[name]) for name in ("copies", "echoes"))
        return record["prompt"], cls(record["recall"], *scores)


class TopKeyProbe:
    """SDPA attention that, while it watches, also notes where each head looks.

    ``top_keys[layer]`` is a list of tensors ``[H_q, queries]``, one for every forward
    pass: the key position with the highest logit, hence the highest probability.
    """

    def __init__(self) -> None:
        self.top_keys: dict[int, list[Tensor]] = {}
        self._watching = False

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(_ATTENTION, self)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note top keys inside the context, beginning with none."""
        self.top_keys = {}
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend; shapes ``[1, H_q, queries, d]`` and ``[1, H_kv, keys, d]``."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if self._watching:
            noted = self.top_keys.setdefault(module.layer_idx, [])
            noted.append(_top_keys(query[0], key[0], attention_mask))
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output, None


@torch.inference_mode()
def run_trial(
    model: Any,
    tokenizer: Any,
    probe: TopKeyProbe,
    prompt: NeedlePrompt,
    max_decode_tokens: int,
) -> Trial:
    """Let the model answer greedily and count what each query head did.

    The prose is prefilled at once. From the question on ``probe`` watches: all but the
    prompt's last token in one pass, then one query a step.
    """
    from transformers import DynamicCache

    def forward(token_ids: list[int]) -> int:
        ids = torch.tensor([token_ids], device=model.device)
        output = model(ids, past_key_values=cache, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    cache = DynamicCache()
    stops = _stop_tokens(model, tokenizer)
    question = prompt.question_start
    forward(prompt.token_ids[:question])
    response: list[int] = []
    with probe.watching():
        forward(prompt.token_ids[question:-1])
        token = prompt.token_ids[-1]
        while len(response) < max_decode_tokens:
            token = forward([token])
            if token in stops:
                break
            response.append(token)
            if "\n" in tokenizer.decode(response).lstrip():
                break
    recall = score(prompt.answer, tokenizer.decode(response))
    sequence = torch.tensor(prompt.token_ids + response, device=model.device)
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    copies, echoes = torch.zeros(shape), torch.zeros(shape)
    for layer, noted in probe.top_keys.items():
        top_keys = torch.cat(noted, dim=1)
        copies[layer] = count_copies(top_keys, sequence, prompt).cpu()
        echoes[layer] = count_echoes(top_keys, sequence, prompt).cpu()
    return Trial(recall, copies, echoes)


def count_copies(top_keys: Tensor, sequence: Tensor, prompt: NeedlePrompt) -> Tensor:
    """Return the copy score of one layer's heads, ``[H_q]``.

    Args:
        top_keys: ``[H_q, queries]`` from the question's first token on.
        sequence: The prompt and the model's answer, ``[tokens]``.
    """
    first, last = prompt.answer_span
    # The prompt's last token is the query that emits the answer's first one.
    decode = len(prompt.token_ids) - 1
    emitted = sequence[decode + 1 :]
    skip = decode - prompt.question_start
    keys = top_keys[:, skip : skip + len(emitted)]
    hits = (keys >= first) & (keys < last) & (sequence[keys] == emitted)
    return hits.sum(dim=1) / (last - first)


def count_echoes(top_keys: Tensor, sequence: Tensor, prompt: NeedlePrompt) -> Tensor:
    """Return the echo score of one layer's heads, ``[H_q]``; see `count_copies`."""
    first, last = prompt.needle_span
    queries = sequence[prompt.question_start :]
    keys = top_keys[:, : len(queries)]
    queries = queries[: keys.shape[1]]
    hits = (keys >= first) & (keys < last) & (sequence[keys] == queries)
    occurs = torch.isin(queries, sequence[first:last])
    return hits.sum(dim=1) / occurs.sum().clamp(min=1)


def _top_keys(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[H_q, queries]`` for ``[H_q, queries, d]`` and ``[H_kv, keys, d]``."""
    num_kv_heads, num_keys, size = key.shape
    # Query head h reads KV head h // G, so G heads in a row share their keys.
    grouped = query.reshape(num_kv_heads, -1, size)
    logits = (grouped @ key.transpose(1, 2)).view(len(query), -1, num_keys)
    if mask is not None:
        hidden = ~mask[0, 0, :, :num_keys]
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.argmax(dim=-1)


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    return {token for token in (*stops, tokenizer.eos_token_id) if token is not None}
