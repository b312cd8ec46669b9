# SPDX-License-Identifier: Apache-2.0
"""Which KV heads need the whole cache, found by optimisation.

Source: DuoAttention (arXiv 2410.10819, section 3). Every KV head gets a gate between
0 and 1 that mixes attention over the whole cache with attention over sinks and a
recent window. The gates alone are trained: to answer as the full model does, at the
least sum of gates. A head that copies is found this way, and so is one that only
leads another head to what it copies, which no look at attention maps shows.

Where we differ: the loss is the KL divergence of the answers' next-token
distributions, not the distance of hidden states; prompts are short, with a window
short in proportion, so that a CPU can do it; needles are sentences, not passkeys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.profiling.answers import answer_log_probs, divergence
from kvserve.profiling.attention_hook import PromptAttention
from kvserve.profiling.recital import Recital, build_recital
from kvserve.texts.families import PROFILING

_BLOCK = 32
_SINK_BLOCKS = 1
_WINDOW_BLOCKS = 4
_MIN_LENGTH = 640
_NEEDLES = (6, 10)
_LEARNING_RATE = 0.05


@dataclass(frozen=True)
class GateSettings:
    """How to train the gates.

    Attributes:
        steps: Prompts to learn from, one a step.
        penalty: Weight of the mean gate against the KL divergence in nats.
        max_length: Tokens of the longest prompt, its reply included.
        seed: Draws prompts.
    """

    steps: int
    penalty: float
    max_length: int
    seed: int


class GatedAttention(PromptAttention):
    """Causal attention whose KV heads mix the whole cache with a window.

    ``gates`` has shape ``[R, H_kv]``; ``None`` is the full model.
    """

    name = "kvserve_gates"

    def __init__(self) -> None:
        self.gates: Tensor | None = None
        self._visible = torch.zeros(0, 0, dtype=torch.bool)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
        attend = functional.scaled_dot_product_attention
        output = attend(query, key, value, is_causal=True, scale=scale)
        if self.gates is not None:
            visible = self._window(query.shape[2], query.device)
            window = attend(query, key, value, attn_mask=visible, scale=scale)
            gate = self.gates[layer].repeat_interleave(group)
            output = torch.lerp(window, output, gate[None, :, None, None])
        return output

    def _window(self, tokens: int, device: torch.device) -> Tensor:
        if len(self._visible) != tokens:
            self._visible = window_mask(tokens).to(device)
        return self._visible


def window_mask(tokens: int) -> Tensor:
    """What a query of a windowed head sees, ``[tokens, tokens]``, block by block."""
    block = torch.arange(tokens) // _BLOCK
    query, key = block[:, None], block[None, :]
    near = (key < _SINK_BLOCKS) | (key > query - _WINDOW_BLOCKS)
    return near & torch.ones(tokens, tokens, dtype=torch.bool).tril()


def train_gates(
    model: Any,
    tokenizer: Any,
    settings: GateSettings,
    text: str,
    store: Path,
    progress: bool = True,
) -> Tensor:
    """Return each KV head's gate, ``[R, H_kv]``, averaged over the training.

    The average ranks every head: those that stay open, then those that close late.

    Args:
        store: File that remembers a run that was stopped.
    """
    attention = GatedAttention()
    attention.attach(model)
    model.requires_grad_(False)
    config = model.config.get_text_config()
    shape = config.num_hidden_layers, config.num_key_value_heads
    run = _Run(torch.ones(shape, device=model.device))
    if store.exists():
        run.load_state_dict(torch.load(store, map_location=model.device))
    steps = settings.steps
    with tqdm(total=steps, initial=run.step, disable=not progress) as bar:
        while run.step < steps:
            recital = _recital(tokenizer, settings, run.step, text)
            distance = _learn(model, attention, run, recital, settings)
            bar.set_postfix_str(f"KL {distance:.3f}, open {run.mean_gate:.0%}")
            bar.update()
            _save(run, store)
    return run.total.cpu() / steps


def gates_so_far(store: Path, steps: int) -> Tensor | None:
    """Return the average of a training of ``steps`` that was stopped.

    ``None`` before its middle: until then few gates have closed, and the order of the
    others is chance.
    """
    if not store.exists():
        return None
    run: dict[str, Any] = torch.load(store, map_location="cpu")
    if run["step"] < max(steps // 2, 1):
        return None
    average: Tensor = run["total"] / run["step"]
    return average


def _save(run: _Run, store: Path) -> None:
    """Remember a step; whoever is stopped while writing has the step before."""
    unfinished = store.with_suffix(".part")
    torch.save(run.state_dict(), unfinished)
    unfinished.replace(store)


class _Run:
    """Gates in training."""

    def __init__(self, gates: Tensor) -> None:
        self.step = 0
        self.gates = gates.requires_grad_()
        self.total = torch.zeros_like(gates, requires_grad=False)
        self.optimizer = torch.optim.Adam(
            [self.gates], lr=_LEARNING_RATE, betas=(0.8, 0.95)
        )

    @property
    def mean_gate(self) -> float:
        return float(self.gates.detach().mean())

    def update(self, loss: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
            self.total += self.gates
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "gates": self.gates.detach(),
            "total": self.total,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total = state["step"], state["total"]
        with torch.no_grad():
            self.gates.copy_(state["gates"])
        self.optimizer.load_state_dict(state["optimizer"])


def _recital(tokenizer: Any, settings: GateSettings, step: int, text: str) -> Recital:
    seed = f"gates/{settings.seed}/{step}"
    rng = random.Random(seed)
    length = rng.randint(min(_MIN_LENGTH, settings.max_length), settings.max_length)
    count = rng.randint(*_NEEDLES)
    return build_recital(tokenizer, PROFILING, length, count, seed, text)


def _learn(
    model: Any,
    attention: GatedAttention,
    run: _Run,
    recital: Recital,
    settings: GateSettings,
) -> float:
    """Take one step; return how far the gated model was from the full one."""
    attention.gates = None
    with torch.no_grad():
        full = answer_log_probs(model, recital)
    attention.gates = run.gates
    distance = divergence(full, answer_log_probs(model, recital))
    rate = _LEARNING_RATE * min(
        1.0, (run.step + 1) / 10, 5 * (1 - run.step / settings.steps)
    )
    run.update(distance + settings.penalty * run.gates.mean(), rate)
    return float(distance.detach())
