# SPDX-License-Identifier: Apache-2.0
"""The benchmark around vLLM's client: workloads, samples, table, errors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvserve.bench.command import (
    bench,
    compiled_alike,
    flags_of,
    make_parser,
    measure,
    named_policies,
)
from kvserve.bench.loads import Requests
from kvserve.bench.result import Result, draw, table, write_json
from kvserve.bench.scrape import Sample, Sampler, read_sample
from kvserve.bench.workloads import (
    WORKLOADS,
    Request,
    draw_workload,
    read_lines,
    requests_in,
    write_workload,
)
from kvserve.cli import main
from kvserve.errors import UserError

_METRICS = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 2
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 1
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0"} 4
"""


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_for_a_seed_and_another_for_another(name: str) -> None:
    assert draw_workload(name, 5, 0) == draw_workload(name, 5, 0)
    # More requests do not change the first ones.
    assert draw_workload(name, 8, 0)[:5] == draw_workload(name, 5, 0)
    assert draw_workload(name, 5, 1) != draw_workload(name, 5, 0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_are_near_what_is_asked_for(name: str) -> None:
    requests = draw_workload(name, 200, 0, prompt_tokens=1000, output_tokens=100)
    characters = [sum(len(m["content"]) for m in r.messages) for r in requests]
    assert sum(characters) / len(requests) / 4.4 == pytest.approx(1000, rel=0.1)
    outputs = [request.output_tokens for request in requests]
    assert sum(outputs) / len(outputs) == pytest.approx(100, rel=0.05)
    assert min(outputs) >= 75
    assert max(outputs) <= 125


def test_chats_take_turns_and_end_with_the_user() -> None:
    requests = draw_workload("chat", 30, 0)
    assert len({len(request.messages) for request in requests}) == 5
    for request in requests:
        roles = [message["role"] for message in request.messages]
        assert roles == (["user", "assistant"] * 5)[: len(roles)]
        assert roles[-1] == "user"


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    requests = draw_workload(name, 6, 0)
    write_workload(tmp_path / "load.jsonl", requests)
    assert requests_in(read_lines(tmp_path / "load.jsonl")) == requests


def test_the_command_writes_a_workload_and_sends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    flags = ["--workload", "long-document", "--requests", "3"]
    assert bench([*flags, "--write-workload", str(path)]) == 0
    assert requests_in(read_lines(path)) == draw_workload("long-document", 3, 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: is not JSON"),
        ("[]", r"line 2: is not an object; expected {.prompt"),
        ('{"prompt": "a"}', "line 2: output_tokens"),
        ('{"prompt": "a", "output_tokens": 0}', "line 2: output_tokens"),
        ('{"prompt": "a", "output_tokens": true}', "line 2: output_tokens"),
        ('{"output_tokens": 4}', "line 2: needs a prompt"),
        ('{"prompt": 7, "output_tokens": 4}', "line 2: needs a prompt"),
        ('{"messages": [], "output_tokens": 4}', "line 2: messages"),
        ('{"messages": [{"role": "user"}], "output_tokens": 4}', "line 2: needs"),
    ],
)
def test_a_bad_line_of_a_workload_file_is_named(
    tmp_path: Path, line: str, said: str
) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text(f'{{"prompt": "a", "output_tokens": 4}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        requests_in(read_lines(path))


def test_output_tokens_of_the_command_stand_in_for_those_of_a_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text('{"prompt": "a"}\n')
    (request,) = requests_in(read_lines(path), output_tokens=9)
    assert request == Request(({"role": "user", "content": "a"},), 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--requests", "0"], "--requests 0"),
        (["--rate", "nan"], "--rate nan"),
        (["--concurrency", "-1"], "--concurrency -1"),
        (["--workload", "chatt"], "choose one of chat"),
        (["--workload", "none.jsonl"], "cannot be read"),
        (["--kv-memory", "lots"], "--kv-memory"),
        (["--url", "http://127.0.0.1:9", "--", "--dtype=half"], "starts no server"),
        (["MODEL", "--url", "http://127.0.0.1:9"], "leave the model out"),
        (["--url", "http://127.0.0.1:9"], "no server answers"),
        (["--url", "not-a-url"], "no server answers"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_samples_add_up_engines_and_take_the_fullest_cache() -> None:
    assert read_sample(_METRICS, 1.5) == Sample(1.5, 5, 1, 0.5, 4)


class _Server(BaseHTTPRequestHandler):
    """Metrics, and a list of models, of a server that is no vLLM."""

    metrics = _METRICS

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(json.dumps({"data": [{"id": "m"}]}))
        else:
            self._answer(self.metrics)

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def fake_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_sampler_looks_at_both_edges_and_in_between(fake_server: str) -> None:
    with Sampler(fake_server) as sampler:
        assert len(sampler.samples) == 1
        time.sleep(0.8)
    seconds = [sample.seconds for sample in sampler.samples]
    assert len(seconds) >= 4
    assert seconds == sorted(seconds)


def test_a_server_that_is_not_vllm_is_named(
    fake_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Server, "metrics", "python_info 1\n")
    load = Requests("chat", draw_workload("chat", 1, 0), 0, float("inf"), None)
    with pytest.raises(UserError, match="kv_cache_usage_perc"):
        measure(fake_server, "x", load)


def _measured() -> dict[str, Any]:
    return {
        "duration": 4.0,
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 200,
        "total_output_tokens": 6,
        # The third broke off after three tokens.
        "output_lens": [3, 2, 0],
        "itls": [[0.1, 0.3], [0.2], [60.0, 60.0]],
        "ttfts": [1.0, 3.0, 50.0],
        "errors": ["", "", "Traceback\nConnectionError: gone\n"],
    }


def _result(policy: str, **changes: Any) -> Result:
    timeline = [Sample(0, 0, 0, 0.0, 3), Sample(1, 2, 1, 0.5, 5), Sample(4, 0, 0, 0, 5)]
    return Result.from_run(policy, _measured() | changes, timeline)


def test_a_result_has_rates_of_the_run_and_peaks_of_the_server() -> None:
    result = _result("full")
    assert result.requests_per_second == 0.5
    assert result.output_per_second == 1.5
    assert (result.ttft.mean, result.ttft.p50) == (2.0, 2.0)
    # Nothing of the one that failed.
    assert result.itl.mean == pytest.approx(0.2)
    assert (result.most_running, result.peak_usage, result.preemptions) == (2, 0.5, 2)
    assert result.first_error == "ConnectionError: gone"


def test_policies_are_named_as_for_serve() -> None:
    h2o = "h2o:budget=25%,norm=count"
    for flags in (["--compare", f"none,{h2o}"], ["--policy", "none", "--policy", h2o]):
        args = make_parser().parse_args(flags)
        assert named_policies(args) == ["none", h2o]
    assert flags_of(make_parser().parse_args([]), h2o)[-2:] == ["--policy", h2o]
    with pytest.raises(UserError, match="h2o has no such argument"):
        bench(["--compare", "none,h2o:budget=25%,size=4"])


def test_the_table_compares_throughput_with_the_first_row() -> None:
    faster = _result("retrieval", total_output_tokens=12)
    header, _, *rows = table([_result("none"), faster]).splitlines()
    assert [len(row.split("|")) for row in rows] == [len(header.split("|"))] * 2
    assert "| none | 0.5 | 1.5 | 1.00 | 2.00 |" in rows[0]
    assert "| retrieval | 0.5 | 3.0 | 2.00 |" in rows[1]


def test_a_run_in_which_everything_failed_is_still_shown() -> None:
    nothing = {"completed": 0, "total_output_tokens": 0, "output_lens": [0, 0, 0]}
    assert "| 0.00 |" in table([_result("full", **nothing)])


def test_picture_and_json_are_written(tmp_path: Path) -> None:
    results = [_result("none"), _result("full")]
    draw(tmp_path / "a.png", "title", results)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / "a.json", {"seed": 0}, results)
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["seed"] == 0
    assert [run["policy"] for run in document["runs"]] == ["none", "full"]
    assert document["runs"][0]["preemptions"] == 2
    assert len(document["runs"][0]["timeline"]) == 3


@pytest.mark.parametrize("flag", ["--image", "--json"])
def test_a_folder_that_is_missing_is_named_before_anything_runs(
    flag: str, tmp_path: Path
) -> None:
    path = tmp_path / "none" / "file.png"
    with pytest.raises(UserError, match=f"{flag} .*no such folder"):
        bench([flag, str(path)])


@pytest.mark.parametrize(
    ("policies", "further", "flags"),
    [
        (["none", "full"], [], ["-O2"]),
        (["full", "retrieval"], [], []),
        (["none", "full"], ["--enforce-eager"], []),
        (["none", "full"], ["-O1"], []),
    ],
)
def test_stock_vllm_is_compared_with_engines_that_are_compiled_as_it_is(
    policies: list[str], further: list[str], flags: list[str]
) -> None:
    assert compiled_alike(policies, further) == flags
