# SPDX-License-Identifier: Apache-2.0
"""The flags of ``kvserve eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvserve.evaluation.catalogue import built_in, groups
from kvserve.evaluation.contenders import DTYPES
from kvserve.evaluation.ladder import LADDER
from kvserve.evaluation.tasks import REPLY
from kvserve.models import add_model
from kvserve.processor import default_dtype
from kvserve.texts.haystack import Book

BOOK: Book = "persuasion"
_EXAMPLES = """examples:
  kvserve eval --policy retrieval:budget=0.25 --policy snapkv:budget=0.25
  kvserve eval --budgets ladder --policy retrieval --policy snapkv --length 4096
  kvserve eval MODEL --policy sink-recent:budget=512 --task needle,multikey \\
      --length 1024,4096 --samples 16 --out report/
  kvserve eval --policy snapkv --task ruler --question both --length 4096
  kvserve eval --policy h2o:budget=0.25 --task long --reply 1500 --length 4096
  kvserve eval --policy h2o --task questions.jsonl      your own prompts and answers
  kvserve eval --find-budget 0.99 --policy retrieval --length 4096
  kvserve eval --url http://127.0.0.1:8000              a server that is running

A policy is NAME or NAME:key=value,key=value; besides its own parameters every policy
takes budget=0.25 (share of KV entries) or budget=512 (tokens). `full` is always run,
to compare with. Ctrl-C keeps what is done; the same command goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``kvserve eval``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Measure what cache policies lose, through the real engine."
    parser.epilog = _EXAMPLES
    add_model(parser)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="a policy to measure; may be given several times (default: full)",
    )
    parser.add_argument(
        "--budgets",
        metavar="BUDGET,...|ladder",
        help="measure each --policy that has no budget of its own at each of these; "
        f"`ladder` is {','.join(LADDER)}".replace("%", "%%"),
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="[NAME=]URL",
        help="measure a running server instead; may be given several times. The name "
        "`full` makes it what others are compared with. OPENAI_API_KEY is sent along",
    )
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME|FILE.jsonl,...",
        help=f"{', '.join(built_in())}; {', '.join(groups())} for all of a kind; or a "
        'file of lines {"prompt": ..., "answer": ...} (default: needle)',
    )
    parser.add_argument(
        "--question",
        choices=("after", "before", "both"),
        default="after",
        help="where a task that asks of a text has its question: a policy that judges "
        "tokens as they are written knows only one that comes before. Tasks asked so "
        "end in -before (default: after)",
    )
    parser.add_argument(
        "--length",
        action="append",
        metavar="N,...",
        help="tokens of prompt and reply together (default: 1024,2048,4096, or 4096 "
        "with --find-budget)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=16,
        metavar="N",
        help="prompts for each task and length, depths spread evenly (default: 16)",
    )
    parser.add_argument(
        "--protect",
        choices=("system",),
        help="spare the system prompts of instructions, leak and system-facts from "
        "eviction, as `kvserve serve --protect system` does",
    )
    parser.add_argument(
        "--reply",
        type=int,
        default=REPLY,
        metavar="N",
        help=f"tokens of a reply to long-copy and long-count (default: {REPLY})",
    )
    parser.add_argument(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="text to hide things in (default: a novel that ships)",
    )
    parser.add_argument(
        "--find-budget",
        type=float,
        metavar="SHARE",
        help="bisect the budget of one --policy to the least memory that keeps this "
        "share of the full score, e.g. 0.99",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws all prompts (default: 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default_dtype(),
        help="default: bfloat16, or float32 where that is much faster",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="TYPE",
        help="what pages hold, e.g. int8_per_token_head (default: the model's type)",
    )
    parser.add_argument(
        "--kv-memory",
        metavar="BYTES",
        help="size of each engine's KV pool, e.g. 2GiB (default: eight full requests)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="where results are kept and the report is written (default: report)",
    )
