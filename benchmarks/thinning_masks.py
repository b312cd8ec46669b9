# SPDX-License-Identifier: Apache-2.0
"""What scorers of thinned history are worth, by masks instead of an engine.

    python -m benchmarks.thinning_masks [--length 2500] [--budget-length 4096]
        [--contexts 4] [--first-context 0]
        [--scorers knorm keydiff kvzap oracle] [--budgets 0.25 0.125]

Numbers are hidden in a held-out novel, two for each of several wordings, and each is
asked for twice: at once, and in a second turn that follows the question for another.
Queries see what a decode step at their position would see: sinks, the kept tokens of
each group that lies wholly behind the window, and everything after. An answer is right
if every one of its tokens is the model's best; questions that the full cache gets wrong
are left out, but for the nats. ``oracle`` are the scores of repeating the very context.

Budgets are shares of requests of ``--budget-length`` tokens; shorter ones, which small
models answer better, hold as much of their history and more altogether.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.thinning_cases import KEYS, Case, build_case
from kvserve.models import embedded_model
from kvserve.profiling.attention_hook import PlainAttention, install_attention
from kvserve.profiling.repetition import RepetitionProbe, read_and_repeat, repeat
from kvserve.profiling.runs import load_model
from kvserve.texts.needles import chat
from policies.base import ModelShape
from policies.expected_attention import ExpectedAttention
from policies.history import Keeps
from policies.keydiff import KeyDiff
from policies.knorm import KNorm
from policies.kvzap import KVzap
from policies.thinning import Groups, ThinningPolicy

_PAGE, _SINKS, _GROUP = 32, 32, 128
_POLICIES: dict[str, type[ThinningPolicy]] = {
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "expected-attention": ExpectedAttention,
    "kvzap": KVzap,
}

Scorer = Callable[[int, Groups], Tensor]


@dataclass(frozen=True)
class Span:
    """Queries ``first .. last`` that see alike.

    They see the sinks, what is kept of ``groups`` groups, the context from there to
    ``context``, and causally what follows from ``own`` on.
    """

    first: int
    last: int
    groups: int
    context: int
    own: int


def spans_of(case: Case, recent: int) -> list[Span]:
    """Cut all queries of a case where what they see changes."""
    window = case.positions // _PAGE - (recent // _PAGE - 1)
    complete = (case.context - _SINKS) // _GROUP
    groups = ((window * _PAGE - _SINKS) // _GROUP).clamp(0, complete)
    found = []
    for start, end in [(0, case.context), *case.questions]:
        counts, lengths = groups[start:end].unique_consecutive(return_counts=True)
        first = start
        for count, length in zip(counts.tolist(), lengths.tolist(), strict=True):
            own = first if start == 0 else start
            context = min(own, case.context)
            found.append(Span(first, first + length, count, context, own))
            first += length
    return found


class ThinnedAttention(PlainAttention):
    """Attention of a case whose heads keep ``keeps`` of each group."""

    name = "benchmark_thinned"

    def __init__(self, recent: int) -> None:
        super().__init__()
        self.recent = recent

    def attach(self, model: Any) -> None:
        super().attach(model)
        # Questions do not see each other, which is not the library's to know.
        install_attention(model, self.name, self, lambda *_, **__: None)

    def see(self, case: Case, scorer: Scorer, keeps: Keeps) -> None:
        """Set what is read next."""
        self.case, self.scorer, self.keeps = case, scorer, keeps
        self.spans = spans_of(case, self.recent)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        plain = self.plain("k", layer, key)
        scores = self.scorer(layer, self._groups(plain, value[0]))
        output = torch.empty_like(query)
        shared = query.shape[1] // key.shape[1]
        for head, keep in enumerate(self.keeps[layer]):
            heads = slice(head * shared, (head + 1) * shared)
            first = torch.arange(len(scores))[:, None] * _GROUP + _SINKS
            kept = first + scores[:, head].topk(keep).indices.sort().values
            for span in self.spans:
                rows = slice(span.first, span.last)
                seen = self._seen(span, kept)
                mask = torch.ones(span.last - span.first, len(seen), dtype=torch.bool)
                mask = mask.tril(len(seen) - (span.last - span.first))
                output[:, heads, rows] = functional.scaled_dot_product_attention(
                    query[:, heads, rows],
                    key[:, head, seen][:, None].expand(-1, shared, -1, -1),
                    value[:, head, seen][:, None].expand(-1, shared, -1, -1),
                    attn_mask=mask,
                    scale=scale,
                )
        return output

    def _seen(self, span: Span, kept: Tensor) -> Tensor:
        start = _SINKS + span.groups * _GROUP if span.groups else 0
        parts = [torch.arange(start, span.context), torch.arange(span.own, span.last)]
        if span.groups:
            parts = [torch.arange(_SINKS), kept[: span.groups].flatten(), *parts]
        return torch.cat(parts)

    def _groups(self, keys: Tensor, values: Tensor) -> Groups:
        """Cut what lies behind the sinks into groups, ``[n, H_kv, G, d]``."""
        count = (self.case.context - _SINKS) // _GROUP
        rows = slice(_SINKS, _SINKS + count * _GROUP)
        keys, values = (
            part[:, rows].unflatten(1, (count, _GROUP)).transpose(0, 1)
            for part in (keys, values)
        )
        positions = torch.arange(rows.start, rows.stop).view(count, _GROUP)
        return Groups(keys, values, positions)

    def share(self) -> float:
        """Of the context's tokens, what is held when it has been read."""
        last = self.spans[-1 if not self.case.ends else 0 - len(self.case.ends)]
        context = self.case.context
        raw = context - _GROUP * last.groups
        keeps = [keep for layer in self.keeps for keep in layer]
        held = [min(raw + last.groups * keep, context) for keep in keeps]
        return sum(held) / len(held) / context


def read(model: Any, case: Case) -> list[tuple[bool, float]]:
    """Tell of each question whether its answer is right, and how likely it is.

    Returns:
        Whether the model says the answer, and its log-probability, in nats.
    """
    tokens = torch.tensor(case.tokens)
    places = torch.cat(
        [
            torch.arange(end - answer, end)
            for end, answer in zip(case.ends, case.answers, strict=True)
        ]
    )
    with torch.inference_mode():
        logits = model(
            tokens[None],
            position_ids=case.positions[None],
            use_cache=False,
            logits_to_keep=places - 1,
        ).logits[0]
    best = (logits.argmax(-1) == tokens[places]).split(case.answers)
    likely = logits.log_softmax(-1).gather(1, tokens[places, None]).split(case.answers)
    return [(bool(a.all()), float(b.sum())) for a, b in zip(best, likely, strict=True)]


def oracle_scores(model_dir: str, cases: list[Case], parts: int) -> list[Tensor]:
    """What repeating each context looks at, ``[R, H_kv, context]``, part by part."""
    model, tokenizer = load_model(model_dir, {})
    probe = RepetitionProbe()
    probe.attach(model)
    found = []
    for case in cases:
        rendered = chat(tokenizer, f"{case.text}\n\nRepeat the text above.")
        size = -(-len(case.text) // parts)
        most = torch.zeros(1)
        for start in range(0, len(case.text), size):
            part = repeat(tokenizer, rendered, case.text[start : start + size])
            readings = read_and_repeat(model, probe, part)
            scores = torch.stack([one.scores for one in readings])
            missing = case.context - scores.shape[-1]
            most = torch.maximum(most, functional.pad(scores, (0, missing)))
        found.append(most)
    return found


def oracle(scores: Tensor) -> Scorer:
    """A scorer that knows what repeating this context looks at."""

    def judge(layer: int, groups: Groups) -> Tensor:
        return scores[layer][:, groups.positions].transpose(0, 1)

    return judge


def of_policy(policy: ThinningPolicy, shape: ModelShape) -> Scorer:
    """The scorer of a policy."""
    return lambda layer, groups: policy.scores(shape, layer, groups)


def main() -> None:
    """Print a line for each scorer and budget."""
    args = _arguments()
    model_dir = str(embedded_model())
    model, tokenizer = load_model(model_dir, {})
    indices = range(args.first_context, args.first_context + args.contexts)
    cases = [build_case(tokenizer, args.length, index) for index in indices]
    known: list[Tensor] = []
    if "oracle" in args.scorers:
        known = oracle_scores(model_dir, cases, -(-args.length // 3900))
    attention = ThinnedAttention(args.recent)
    attention.attach(model)
    config = model.config
    shape = ModelShape(
        Path(model_dir).name,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        max_tokens=args.budget_length,
    )
    everything = ((_GROUP,) * shape.num_kv_heads,) * shape.num_layers
    known_right: list[list[tuple[bool, float]]] = []
    for case in cases:
        attention.see(case, of_policy(KNorm(), shape), everything)
        known_right.append(read(model, case))
    _show("full", 1.0, 1.0, known_right, known_right)
    for budget, name in itertools.product(args.budgets, args.scorers):
        policy = _POLICIES.get(name, KNorm)(
            budget=budget, profile=args.profile, recent=args.recent
        )
        budgets = policy.budgets(shape, args.budget_length)
        keeps = tuple(tuple(head.keep for head in layer) for layer in budgets)
        answers = []
        for index, case in enumerate(cases):
            judge = of_policy(policy, shape)
            if name == "oracle":
                judge = oracle(known[index])
            attention.see(case, judge, keeps)
            answers.append(read(model, case))
        _show(name, budget, attention.share(), answers, known_right)


def _show(
    name: str,
    budget: float,
    share: float,
    answers: list[list[tuple[bool, float]]],
    known: list[list[tuple[bool, float]]],
) -> None:
    """Print how many of the questions that ``known`` has right are right."""
    shown = []
    for turn, what in enumerate(("at once", "second turn")):
        part = slice(turn * KEYS, (turn + 1) * KEYS)
        pairs = [
            (found, full)
            for one, other in zip(answers, known, strict=True)
            for (found, _), (full, _) in zip(one[part], other[part], strict=True)
        ]
        both = sum(found and full for found, full in pairs)
        shown.append(f"{what} {both} of {sum(full for _, full in pairs)}")
    likely = [nats for one in answers for _, nats in one]
    print(
        f"{name:20} {budget:6.1%} held {share:6.2%}  {', '.join(shown)}, "
        f"{-sum(likely) / len(likely):.2f} nats an answer",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--length", type=int, default=2500)
    parser.add_argument("--budget-length", type=int, default=4096)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--first-context", type=int, default=0)
    names = [*_POLICIES, "oracle"]
    parser.add_argument("--scorers", nargs="+", choices=names, default=names)
    budgets = [0.25, 0.15, 0.125, 0.1]
    parser.add_argument("--budgets", nargs="+", type=float, default=budgets)
    parser.add_argument("--recent", type=int, default=96, help="tokens of the window")
    parser.add_argument("--profile", help="another history.json than that which ships")
    return parser.parse_args()


if __name__ == "__main__":
    main()
