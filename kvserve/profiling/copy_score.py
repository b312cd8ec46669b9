# SPDX-License-Identifier: Apache-2.0
"""What each head copies while the model answers one needle (arXiv 2404.15574)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvserve.profiling.attention_hook import install_attention
from kvserve.texts.needles import NeedlePrompt, score

_ATTENTION = "kvserve_top_key"


@dataclass(frozen=True)
class Instance:
    """What one needle showed. ``copied`` maps (layer, query head) to its score."""

    recall: float
    copied: dict[tuple[int, int], float]

    def to_json(self, key: str) -> str:
        copied = {f"{layer}-{head}": x for (layer, head), x in self.copied.items()}
        return json.dumps({"prompt": key, "recall": self.recall, "copied": copied})

    @classmethod
    def from_json(cls, line: str) -> tuple[str, Instance]:
        record = json.loads(line)
        copied = {
            (int(layer), int(head)): value
            for name, value in record["copied"].items()
            for layer, head in [name.split("-")]
        }
        return record["prompt"], cls(record["recall"], copied)


class TopKeyProbe:
    """SDPA attention that, for a single query, also notes where each head looks.

    ``top_keys[layer]`` has shape ``[H_q]``: the key position with the highest logit,
    which is the one with the highest attention probability.
    """

    def __init__(self) -> None:
        self.top_keys: dict[int, Tensor] = {}

    def attach(self, model: Any) -> None:
        """Make ``model`` compute its attention here."""
        from transformers.masking_utils import sdpa_mask

        install_attention(model, _ATTENTION, self, sdpa_mask)

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

        if query.shape[2] == 1:
            # Query head h reads KV head h // G, so G heads in a row share their keys.
            grouped = query.view(key.shape[1], -1, query.shape[3])
            logits = (grouped @ key[0].transpose(1, 2)).flatten(0, 1)
            if attention_mask is not None:
                visible = attention_mask[0, 0, -1, : key.shape[2]]
                logits = logits.masked_fill(~visible, float("-inf"))
            self.top_keys[module.layer_idx] = logits.argmax(dim=-1)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output, None


@torch.inference_mode()
def run_instance(
    model: Any,
    tokenizer: Any,
    probe: TopKeyProbe,
    prompt: NeedlePrompt,
    max_decode_tokens: int,
) -> Instance:
    """Let the model answer greedily and count what each query head copied.

    The prompt but its last token is prefilled at once. From there on every step has
    one query, whose top key ``probe`` notes before the token it led to is known.
    """
    from transformers import DynamicCache

    prompt_ids = torch.tensor(prompt.token_ids, device=model.device)
    first, last = prompt.answer_span
    cache = DynamicCache()
    model(prompt_ids[None, :-1], past_key_values=cache, logits_to_keep=1)
    stops = _stop_tokens(model, tokenizer)
    token = prompt_ids[-1]
    response: list[int] = []
    copied: dict[tuple[int, int], float] = {}
    for _ in range(max_decode_tokens):
        logits = model(token.view(1, 1), past_key_values=cache).logits
        token = logits[0, -1].argmax()
        if int(token) in stops:
            break
        response.append(int(token))
        if "\n" in tokenizer.decode(response).lstrip():
            break
        for layer, keys in probe.top_keys.items():
            in_answer = (keys >= first) & (keys < last)
            hits = in_answer & (prompt_ids[keys.clamp(max=last - 1)] == token)
            for head in hits.nonzero().flatten().tolist():
                hit = copied.get((layer, head), 0.0) + 1 / (last - first)
                copied[layer, head] = hit
    recall = score(prompt.answer, tokenizer.decode(response))
    return Instance(recall, copied)


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    return {token for token in (*stops, tokenizer.eos_token_id) if token is not None}
