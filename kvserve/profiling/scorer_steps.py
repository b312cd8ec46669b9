# SPDX-License-Identifier: Apache-2.0
"""The steps of ``kvserve profile scorer``, each of which a stopped run goes on with.

Every text that was read, every network that was trained and every prompt that was
weighed is a file of a run's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from kvserve.profiling.history_cost import (
    GROUP,
    LADDER,
    SINKS,
    HistoryProbe,
    measure_history,
)
from kvserve.profiling.recital import build_recital
from kvserve.profiling.repetition import (
    Reading,
    RepetitionProbe,
    build_repetition,
    read_and_repeat,
)
from kvserve.profiling.score_training import train_network
from kvserve.texts.families import PROFILING
from policies.kvzap import Network, foretell, inputs_of
from policies.thinning import Groups

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ScorerRun:
    """A model that is measured.

    Attributes:
        text: Prose to hide facts in.
        tokens: Of each text and prompt.
        facts, recited: Facts in each text, and in each prompt, whose reply recites
            them.
        folder: Where finished work is kept.
        progress: Whether to show bars.
    """

    model: Any
    tokenizer: Any
    text: str
    tokens: int
    facts: int
    recited: int
    seed: int
    folder: Path
    progress: bool

    def read(self, texts: int) -> list[Tensors]:
        """Read and repeat texts: what :func:`in_groups` and :func:`moments` say."""
        probe = RepetitionProbe()
        probe.attach(self.model)
        found = []
        for item in self._bar(texts, "reading", "text"):
            path = self.folder / f"text-{item:04}.safetensors"
            if not path.exists():
                self._read_one(probe, item, path)
            found.append(load_file(path))
        probe.detach()
        return found

    def _read_one(self, probe: RepetitionProbe, item: int, path: Path) -> None:
        seed = f"scorer/{self.seed}/{item}"
        repetition = build_repetition(
            self.tokenizer, PROFILING, self.tokens, self.facts, seed, self.text
        )
        readings = read_and_repeat(self.model, probe, repetition)
        layers = torch.tensor(sorted(probe.readings))
        found = in_groups(readings, repetition.text[1]) | moments(readings)
        save_whole({**found, "layers": layers}, path)

    def train(
        self, texts: list[Tensors], width: int, epochs: int
    ) -> dict[int, Network]:
        """Train the network of each layer that was read."""
        networks = {}
        layers = texts[0]["layers"].tolist()
        for place in self._bar(len(layers), "learning", "layer"):
            path = self.folder / f"layer-{place:03}.safetensors"
            if not path.exists():
                keys, values, scores = (
                    torch.cat([one[name][place] for one in texts]).float()
                    for name in ("keys", "values", "scores")
                )
                inputs = inputs_of(Groups(keys, values, torch.empty(0)))
                network = train_network(inputs, scores, width, epochs, self.seed)
                save_whole(network, path)
            networks[layers[place]] = load_file(path)
        return networks

    def weigh(self, networks: dict[int, Network], prompts: int) -> Tensor:
        """What each rung costs each head, ``[R, H_kv, rungs]``, over all prompts.

        Layers without a network, whose queries see a window of their own, cost
        nothing.
        """
        probe = HistoryProbe(_ranked(networks, self.model.device))
        probe.attach(self.model)
        costs = []
        for item in self._bar(prompts, "weighing", "prompt"):
            path = self.folder / f"prompt-{item:04}.safetensors"
            if not path.exists():
                recital = build_recital(
                    self.tokenizer,
                    PROFILING,
                    self.tokens,
                    self.recited,
                    f"history/{self.seed + item}",
                    self.text,
                )
                cost = measure_history(self.model, probe, recital, self.seed + item)
                save_whole({"cost": cost}, path)
            costs.append(load_file(path)["cost"])
        probe.detach()
        mean = torch.stack(costs).mean(0)
        found = torch.zeros(self._layers, mean.shape[1], len(LADDER))
        found[[*networks]] = mean
        return found

    @cached_property
    def _layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def _bar(self, count: int, name: str, unit: str) -> Any:
        return tqdm(range(count), name, unit=unit, disable=not self.progress)


def _ranked(networks: dict[int, Network], device: torch.device) -> Any:
    there = {
        layer: {part: tensor.to(device) for part, tensor in network.items()}
        for layer, network in networks.items()
    }
    return lambda layer, groups: foretell(there[layer], inputs_of(groups))


def in_groups(readings: Sequence[Reading], end: int) -> Tensors:
    """Lay together what all layers saw of whole groups before ``end``, in half floats.

    Returns:
        Keys and values, ``[R, n, H_kv, G, d]``, and scores, ``[R, n, H_kv, G]``.
    """
    count = (end - SINKS) // GROUP
    rows = slice(SINKS, SINKS + count * GROUP)

    def cut(parts: list[Tensor]) -> Tensor:
        together = torch.stack([part[:, rows].half().cpu() for part in parts])
        shape = *together.shape[:2], count, GROUP, *together.shape[3:]
        return together.view(shape).transpose(1, 2).contiguous()

    return {
        "keys": cut([one.keys for one in readings]),
        "values": cut([one.values for one in readings]),
        "scores": cut([one.scores for one in readings]),
    }


def moments(readings: Sequence[Reading]) -> Tensors:
    """Means of queries and of their products, ``[R, H_q, d]``, ``[R, H_q, d, d]``."""
    queries = torch.stack([one.queries for one in readings])
    products = queries.transpose(2, 3) @ queries / queries.shape[2]
    return {"mean": queries.mean(2).cpu(), "products": products.cpu()}


def save_whole(
    tensors: Tensors, path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a file that whoever finds it finds all of."""
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(save(tensors, metadata))
    unfinished.replace(path)
