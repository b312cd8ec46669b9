# SPDX-License-Identifier: Apache-2.0
"""Long prompts on a small pool: the same load and bytes of KV cache for each engine.

All requests are there from the start; engines run one after the other. Speed (tokens a
second) and capacity (requests at once) are columns of their own.

    python -m benchmarks.serving --requests 8 --prompt 4096 --output 128 \\
      --kv-memory 256MiB --engines none none:kv_cache_dtype=fp8 full retrieval

``openvino`` is OpenVINO GenAI in its own environment (``make bench-openvino``), and
``openvino:1536`` the same with its cache eviction down to as many tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from vllm import SamplingParams

from benchmarks.engines import STOCK, random_prompts, start_engine
from benchmarks.figures import colours
from benchmarks.tables import OUT, Report, Table
from kvserve.models import gguf_file
from kvserve.processor import default_dtype
from kvserve.units import parse_bytes

OPENVINO = "openvino"
COLUMNS = ["engine", "total s", "speed", "requests/s", "output tok/s", "TTFT s"]
COLUMNS += ["of first", "ITL ms", "p99", "most at once", "preempted"]


@dataclass
class Result:
    """What one engine did.

    Attributes:
        first_token: seconds from the start to each request's first token.
        gaps: seconds between two tokens of a reply, of all replies.
        timeline: seconds, and requests that ran.
    """

    engine: str
    requests: int
    output_tokens: int
    seconds: float = 0.0
    preemptions: int = 0
    first_token: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    timeline: list[tuple[float, int]] = field(default_factory=list)

    @property
    def most_running(self) -> int:
        return max(running for _, running in self.timeline)

    @property
    def ttft(self) -> float:
        return statistics.mean(self.first_token)

    @property
    def label(self) -> str:
        name, _, rest = self.engine.partition(":")
        if name == OPENVINO:
            return f"OpenVINO, evicts to {rest}" if rest else "OpenVINO"
        if name == STOCK:
            return f"stock vLLM {rest}".strip()
        return f"kvserve {self.engine}"


def make_engine(name: str, args: argparse.Namespace) -> Any:
    """Start an engine with room for all requests at once, but for its cache."""
    tokens = args.prompt + args.output
    options = {
        "max_model_len": tokens + 64,
        "max_num_seqs": args.requests,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": parse_bytes(args.kv_memory, "--kv-memory"),
        "enforce_eager": args.eager,
        "dtype": args.dtype,
        **args.options,
    }
    return start_engine(name, args.model, tokens, options)


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """The load, the same for every engine."""
    return random_prompts(args.requests, args.prompt, seed=0)


def run_openvino(name: str, args: argparse.Namespace) -> Result:
    """Serve the whole load in OpenVINO's own environment."""
    job = {
        "model": str(gguf_file()),
        "prompts": prompts(args),
        "output": args.output,
        "cache_bytes": parse_bytes(args.kv_memory, "--kv-memory"),
        "kept_tokens": int(name.partition(":")[2] or 0),
    }
    script = Path(__file__).with_name("openvino_serving.py")
    command = [args.openvino_python, str(script)]
    done = subprocess.run(
        command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    measured = ("seconds", "first_token", "gaps", "timeline")
    result = Result(name, args.requests, args.requests * args.output)
    for key in measured:
        setattr(result, key, found[key])
    return result


def run(name: str, args: argparse.Namespace) -> Result:
    """Serve the whole load with one engine."""
    if name.startswith(OPENVINO):
        return run_openvino(name, args)
    llm = make_engine(name, args)
    engine = llm.llm_engine
    warm_up = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate({"prompt_token_ids": [7] * args.prompt}, warm_up, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    for number, ids in enumerate(prompts(args)):
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    result = Result(name, args.requests, args.requests * args.output)
    scheduler = engine.engine_core.engine_core.scheduler
    last: dict[str, float] = {}
    preemptions: dict[str, int] = {}
    bar = tqdm(total=result.output_tokens, desc=name, unit="tok")
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        result.timeline.append((now, len(scheduler.running)))
        for output in outputs:
            before = last.get(output.request_id)
            if before is None:
                result.first_token.append(now)
            else:
                result.gaps.append(now - before)
            last[output.request_id] = now
        bar.update(len(outputs))
        for name, request in scheduler.requests.items():
            preemptions[name] = request.num_preemptions
    bar.close()
    result.preemptions = sum(preemptions.values())
    result.seconds = time.perf_counter() - start
    del llm, engine, scheduler
    gc.collect()
    return result


def table(results: list[Result], args: argparse.Namespace) -> Table:
    """Lay the results out; speed is relative to the first."""
    title = f"{args.requests} requests of {args.prompt} + {args.output} tokens, "
    found, first = Table(f"{title}{args.kv_memory} of KV cache", COLUMNS), results[0]
    for one in results:
        gaps = sorted(one.gaps)
        found.rows.append(
            [
                one.label,
                f"{one.seconds:.0f}",
                f"{first.seconds / one.seconds:.2f}",
                f"{one.requests / one.seconds:.3f}",
                f"{one.output_tokens / one.seconds:.1f}",
                f"{one.ttft:.1f}",
                f"{one.ttft / first.ttft:.2f}",
                f"{statistics.mean(gaps) * 1e3:.0f}",
                f"{gaps[int(0.99 * len(gaps))] * 1e3:.0f}",
                str(one.most_running),
                str(one.preemptions),
            ]
        )
    return found


def draw(results: list[Result], title: str, path: Path) -> None:
    """Draw how many requests each engine runs over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    for result, colour in zip(results, colours(), strict=False):
        seconds, running = zip(*result.timeline, strict=True)
        axes.fill_between(
            [0.0, *seconds], [0, *running], step="pre", alpha=0.3, color=colour
        )
        label = f"{result.label}: {result.seconds:.0f} s"
        axes.step([0.0, *seconds], [0, *running], color=colour, label=label)
    most = max(result.most_running for result in results)
    axes.set(
        xlabel="seconds", ylabel="requests running", ylim=(0, most + 1), title=title
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = [STOCK, "full", "retrieval:budget=0.25"]
    parser.add_argument("--model", default=None)
    parser.add_argument("--engines", nargs="+", default=engines, metavar="NAME")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--output", type=int, default=384)
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--dtype", default=default_dtype())
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="JSON of further vLLM options"
    )
    parser.add_argument("--openvino-python", default=".venv-openvino/bin/python")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = [run(name, args) for name in args.engines]
    report = Report("serving", [table(results, args)])
    report.numbers = {result.engine: asdict(result) for result in results}
    report.write(args.out)
    draw(results, report.tables[0].title, args.out / "serving.png")


if __name__ == "__main__":
    main()
