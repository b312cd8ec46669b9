# SPDX-License-Identifier: Apache-2.0
"""A short question and a long reply: how sane is the text that a policy leaves?

    python -m benchmarks.long_replies
    python -m benchmarks.long_replies --policy full --policy h2o:reply=256

Ten replies of 600 tokens to questions of about 25, at temperature 0.7. Text that a
policy has broken repeats itself: *distinct* is the share of a reply's 4-grams of
tokens that are different, the mean over replies; *worst* is the least of them.
Policies of as many entries a head stand side by side, ``full`` is the model itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kvserve.evaluation.statistics import distinct

_REPLY = 600
_ENTRIES = (256, 64, 128)
_QUESTIONS = (
    "Tell me the story of a lighthouse keeper who finds a letter in a bottle.",
    "Explain how bread is made, from the field to the table, in detail.",
    "Describe a long journey by train through mountains in winter.",
    "Write about the history of the bicycle and how it changed towns.",
    "What should someone know before they plant their first garden?",
)
_SEEDS = (0, 1)


def policies() -> list[str]:
    """The policies that are compared, as they are served."""
    found = ["full"]
    for entries in _ENTRIES:
        found.append(f"h2o:reply={entries}")
        found.append(f"sink-recent:sinks=32,recent={entries - 32}")
    return found


def measure(policy: str) -> list[float]:
    """Distinct 4-grams of every reply under one policy."""
    from vllm import SamplingParams

    from kvserve import LLM

    llm = LLM(
        policy=policy,
        max_model_len=1024,
        max_num_seqs=10,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    chats = [[{"role": "user", "content": text}] for text in _QUESTIONS for _ in _SEEDS]
    params = [
        SamplingParams(temperature=0.7, seed=seed, max_tokens=_REPLY, ignore_eos=True)
        for _ in _QUESTIONS
        for seed in _SEEDS
    ]
    replies = llm.chat(chats, params, use_tqdm=False)
    return [distinct(reply.outputs[0].token_ids) for reply in replies]


def _measure_apart(policy: str) -> list[float]:
    """Measure in a process of its own, whose output vLLM shares: ours is a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shares.json"
        command = [sys.executable, "-m", "benchmarks.long_replies"]
        command += ["--policy", policy, "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        shares: list[float] = json.loads(path.read_text())
        return shares


def main() -> int:
    """Measure every policy in a process of its own and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_replies")
    parser.add_argument("--policy", action="append", help="default: all of them")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:
        (policy,) = args.policy
        args.json.write_text(json.dumps(measure(policy)))
        return 0
    print("| policy | distinct 4-grams | worst reply |\n|---|---|---|")
    for policy in args.policy or policies():
        shares = _measure_apart(policy)
        mean = sum(shares) / len(shares)
        print(f"| `{policy}` | {mean:.2f} | {min(shares):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
