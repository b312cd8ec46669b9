# SPDX-License-Identifier: Apache-2.0
"""Is ``full`` stock vLLM, on a real model, and does it hold no more than stock does?

    python -m benchmarks.model_identity MODEL [--dtype bfloat16]
    python -m benchmarks.model_identity MODEL --kind bytes

``replies``: prompts from a novel, all at once, greedy replies under stock vLLM and
under ``full``. Where two part, the table has how far apart their two likeliest tokens
were for either: a near-tie is what rounding may decide, most of all in bfloat16.

``bytes``: what the scheduler's pool lends one request of some lengths, at its end and
at most on the way, chunks of 2048 tokens. Steps are scheduled, not computed, and each
length has an engine of its own, of which ``budget=`` is a share.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput

from benchmarks.engines import STOCK, start_engine
from benchmarks.tables import OUT, Report, Table
from kvserve.evaluation.model import read_config
from kvserve.texts.haystack import load_book
from kvserve.units import format_bytes

KINDS = ("replies", "bytes")
LENGTHS = {"replies": [100, 600, 1500, 3000], "bytes": [1024, 8192, 32768]}
_STEP_TOKENS = 2048
_REPLY = 32
_CHARACTERS_A_TOKEN = 8


@dataclass(frozen=True)
class Reply:
    """A greedy reply.

    Attributes:
        tokens: of it.
        log_probs: of the two likeliest tokens of each step.
    """

    tokens: list[int]
    log_probs: list[dict[int, float]]

    def gap(self, step: int) -> float:
        """How much likelier the likeliest token was than the next."""
        first, second = sorted(self.log_probs[step].values(), reverse=True)[:2]
        return first - second


@dataclass(frozen=True)
class Comparison:
    """What two engines said to one prompt.

    Attributes:
        prompt: its tokens.
        equal: tokens before the replies part.
        difference: greatest between log probabilities of the same token, until then.
        gap: least between two likeliest tokens under stock vLLM.
        parted: gaps of stock vLLM and of ours where the replies part.
    """

    prompt: int
    equal: int
    difference: float
    gap: float
    parted: tuple[float, float] | None
    text: str

    @classmethod
    def of(cls, prompt: int, stock: Reply, ours: Reply, text: str) -> Comparison:
        pairs = zip(stock.tokens, ours.tokens, strict=True)
        count = len(stock.tokens)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), count)
        differences = [
            abs(stock.log_probs[i][token] - ours.log_probs[i][token])
            for i, token in enumerate(stock.tokens[:equal])
        ]
        parted = None if equal == count else (stock.gap(equal), ours.gap(equal))
        gap = min(map(stock.gap, range(count)))
        return cls(prompt, equal, max(differences, default=0.0), gap, parted, text)

    def row(self, count: int) -> list[str]:
        parted = "-"
        if self.parted:
            parted = " and ".join(f"{gap:.3f}" for gap in self.parted)
        cells = [str(self.prompt), f"{self.equal} of {count}", f"{self.difference:.1e}"]
        return [*cells, f"{self.gap:.3f}", parted]


def prompts(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids of passages from both novels in turn, as long as asked."""
    made = []
    for number, length in enumerate(lengths):
        text = load_book("persuasion" if number % 2 == 0 else "northanger_abbey")
        start = len(text) * (number + 1) // (len(lengths) + 4)
        passage = text[start : start + length * _CHARACTERS_A_TOKEN]
        made.append(tokenizer(passage).input_ids[:length])
        assert len(made[-1]) == length, "the passage is too short"
    return made


def ask(llm: Any, asked: list[list[int]], reply: int) -> list[Reply]:
    """Let an engine reply to all prompts at once."""
    params = SamplingParams(
        temperature=0, max_tokens=reply, logprobs=2, ignore_eos=True
    )
    requests = [{"prompt_token_ids": ids} for ids in asked]
    replies = []
    for output in llm.generate(requests, params, use_tqdm=False):
        (said,) = output.outputs
        steps = [
            {token: found.logprob for token, found in step.items()}
            for step in said.logprobs
        ]
        replies.append(Reply(list(said.token_ids), steps))
    return replies


def engine(name: str, args: argparse.Namespace, lengths: Sequence[int]) -> Any:
    """Start an engine that runs all prompts at once."""
    config = read_config(args.model)
    longest = max(lengths)
    if args.kind == "replies":
        longest += args.reply
    heads = config.num_hidden_layers * config.num_key_value_heads
    size = getattr(config, "head_dim", 0) or (
        config.hidden_size // config.num_attention_heads
    )
    token = 2 * heads * size * (4 if args.dtype == "float32" else 2)
    tokens = (sum(lengths) if args.kind == "replies" else longest) + 4 * _STEP_TOKENS
    options = {
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": len(lengths),
        "max_num_batched_tokens": _STEP_TOKENS,
        "kv_cache_memory_bytes": tokens * token,
        "enforce_eager": True,
    }
    return start_engine(name, args.model, longest, options)


def compare_replies(args: argparse.Namespace, report: Report) -> None:
    """Ask stock vLLM and each engine the same."""
    lengths = args.lengths
    said: dict[str, list[Reply]] = {}
    for name in [STOCK, *args.engines]:
        llm = engine(name, args, lengths)
        tokenizer = llm.get_tokenizer()
        said[name] = ask(llm, prompts(tokenizer, lengths), args.reply)
        del llm
        gc.collect()
    columns = ["prompt", "equal", "greatest difference", "least gap", "gaps at parting"]
    for name in args.engines:
        found = [
            Comparison.of(length, *pair, tokenizer.decode(pair[0].tokens))
            for length, *pair in zip(lengths, said[STOCK], said[name], strict=True)
        ]
        title = f"{Path(args.model).name}, {args.dtype}: {name} and stock vLLM"
        rows = [one.row(args.reply) for one in found]
        report.tables.append(Table(title, columns, rows))
        report.numbers[name] = [asdict(one) for one in found]


def held(llm: Any, length: int) -> tuple[float, float]:
    """Bytes that the pool lends one request of ``length`` tokens: at its end, at most.

    A block's bytes are the pool's over its blocks: groups of layers lie over one
    another in stock vLLM's, and a block belongs to one of them at a time.
    """
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    manager = scheduler.kv_cache_manager
    config, pool = manager.kv_cache_config, manager.block_pool
    block = max(tensor.size for tensor in config.kv_cache_tensors) / config.num_blocks
    free = pool.get_num_free_blocks()
    params = SamplingParams(temperature=0, max_tokens=_REPLY, ignore_eos=True)
    prompt = {"prompt_token_ids": [100] * (length - _REPLY)}
    request = llm.llm_engine.add_request(f"bytes-{length}", prompt, params)
    last, most = 0, 0
    while scheduler.has_unfinished_requests():
        step = scheduler.schedule()
        last = free - pool.get_num_free_blocks()
        most = max(most, last)
        done = scheduler.requests[request].num_computed_tokens >= length - _REPLY
        said = ModelRunnerOutput([request], {request: 0}, [[100] if done else []])
        scheduler.update_from_output(step, said)
    llm.llm_engine.abort_request([request], internal=True)
    return last * block, most * block


def compare_bytes(args: argparse.Namespace, report: Report) -> None:
    """Count what one request holds under stock vLLM and under each engine."""
    columns = ["engine"]
    columns += [f"{n} tokens: end, of stock, peak" for n in args.lengths]
    title = f"{Path(args.model).name}, {args.dtype}: KV bytes of one request"
    table = Table(title, columns)
    stock: list[float] = []
    for name in [STOCK, *args.engines]:
        found = []
        for length in args.lengths:
            llm = engine(name, args, [length])
            found.append(held(llm, length))
            del llm
            gc.collect()
        stock = stock or [last for last, _ in found]
        cells = [
            f"{format_bytes(int(last))}, {last / of:.1%}, {format_bytes(int(most))}"
            for (last, most), of in zip(found, stock, strict=True)
        ]
        table.rows.append(["stock vLLM" if name == STOCK else name, *cells])
        report.numbers[name] = dict(zip(map(str, args.lengths), found, strict=True))
    report.tables.append(table)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--kind", choices=KINDS, default="replies")
    parser.add_argument("--engines", nargs="+", default=["full"], metavar="NAME")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N")
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.lengths = args.lengths or LENGTHS[args.kind]
    report = Report("model_identity")
    (compare_replies if args.kind == "replies" else compare_bytes)(args, report)
    report.write(args.out)


if __name__ == "__main__":
    main()
