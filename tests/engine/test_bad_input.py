# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in one line, before anything has started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvserve import cores
from kvserve.cli import main
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options, prepare_environment
from kvserve.engine.start.preflight import check_start
from kvserve.errors import UserError
from kvserve.units import format_bytes
from tests.engine.conftest import Model
from tests.engine.harness import PAGE

pytestmark = pytest.mark.engine

_FULL = PolicySettings("full")

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def _refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, expect exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("kvserve: error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--policy", "nope"], "--policy nope: unknown"),
        (["--policy", "/no/such.toml"], "--policy /no/such.toml"),
        (["--policy", "full", "--policy-arg", "sinks=1"], "no such argument"),
        (["--policy", "full:sinks=1"], "no such argument; it takes none"),
        (["--policy", "h2o:budget"], "--policy h2o: budget: expected key=value"),
        (["--policy", "h2o:budget=2.5"], "budget=2.5: give a share"),
        (["--policy", "h2o:norm=count", "--policy-arg", "norm=none"], "sets it as"),
        (["--policy", "sink-recent", "--policy-arg", "recent=0"], "at least 1"),
        (["--policy", "sink-recent", "--policy-arg", "recent=few"], "expected int"),
        (["--policy", "retrieval", "--policy-arg", "full_ratio=1.5"], "between"),
        (["--policy", "retrieval", "--policy-arg", "full_ratio=nan"], "not a number"),
        (["--policy", "none", "--policy-arg", "sinks=1"], "takes no arguments"),
        (["--policy-arg", "sinks"], "expected key=value"),
        (
            ["--enable-prefix-caching", "--policy", "h2o"],
            "--enable-prefix-caching: policy h2o keeps of a prefix",
        ),
        (
            ["--enable-prefix-caching", "--scheduler-cls", "my.Scheduler"],
            "--scheduler-cls=my.Scheduler: --policy full runs under SharingScheduler",
        ),
        (
            ["--tensor-parallel-size", "2", "--policy", "heterogeneous"],
            "--tensor-parallel-size=2: heads of a layer would lie on different ranks, "
            "and policy heterogeneous",
        ),
        (
            ["--tensor-parallel-size", "4"],
            "--tensor-parallel-size=4: Total number of attention heads (6) must be",
        ),
        (
            ["--tensor-parallel-size", "3"],
            "--tensor-parallel-size=3: tiny-gqa has 2 KV heads, which cannot be dealt",
        ),
        (
            ["--tensor-parallel-size", "6", "--policy", "h2o"],
            "--tensor-parallel-size=6: tiny-gqa has 2 KV heads, and policy h2o",
        ),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size=2"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype=fp8: head pages have a scale"),
        (["--kv-cache-dtype", "nvfp4"], "--kv-cache-dtype=nvfp4: head pages hold"),
        (
            ["--kv-cache-dtype", "float16", "--dtype", "float32"],
            "--kv-cache-dtype=float16: cannot hold what a model in float32 caches",
        ),
        (["--block-size", "48"], "--block-size=48"),
        (
            ["--kv-transfer-config", '{"kv_connector": "X", "kv_role": "kv_both"}'],
            "--kv-transfer-config",
        ),
        (
            [
                "--speculative-config",
                '{"method": "ngram", "num_speculative_tokens": 2}',
            ],
            "--speculative-config",
        ),
        (["--max-model-len", "100000"], "max_model_len"),
        (
            ["--policy", "h2o", "--scheduler-cls", "my.Scheduler"],
            "--scheduler-cls=my.Scheduler",
        ),
        (
            [
                "--policy",
                "snapkv",
                "--max-num-batched-tokens",
                "64",
                "--max-num-seqs",
                "48",
                "--max-model-len",
                "64",
            ],
            "--max-num-batched-tokens=64",
        ),
        (["--policy", "h2o", "--policy-arg", "norm=all"], "one of none, count"),
        (["--policy", "moa"], "no plan ships for tiny-gqa"),
        (["--policy", "moa", "--policy-arg", "budget=1.5"], "give a share"),
        (["--policy", "moa", "--scheduler-cls", "my.Scheduler"], "--scheduler-cls"),
        (["--policy", "sharded"], "declares no block-sparse pattern"),
        (["--policy", "sharded", "--policy-arg", "pattern=all"], "one of kv, query"),
        (
            ["--policy", "sharded", "--policy-arg", "insist=1"],
            "insist=1: expected bool",
        ),
        (
            [
                "--policy",
                "sharded",
                "--policy-arg",
                "insist=true",
                "--block-size",
                "32",
            ],
            "--block-size=32: --policy sharded thinks in blocks of 64",
        ),
        (
            [
                "--policy",
                "sharded",
                "--policy-arg",
                "insist=true",
                "--policy-arg",
                "block=48",
            ],
            "holds a multiple of 32 tokens",
        ),
    ],
)
def test_serve_refuses_in_one_line(
    flags: list[str],
    named: str,
    models: dict[str, Model],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["serve", str(models["tiny-gqa"].path), "--skip-tokenizer-init", *flags]
    if "--policy" not in flags:
        argv += ["--policy", "full"]
    assert named in _refusal(argv, capsys)


def test_heads_of_the_embedded_model_cannot_be_dealt_to_two_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["serve", "--tensor-parallel-size", "2", "--max-model-len", "1024"]
    line = _refusal(argv, capsys)
    assert "--tensor-parallel-size=2: Total number of attention heads (9)" in line
    assert line.endswith("or --data-parallel-size")


def test_a_list_of_cores_for_another_number_of_workers_is_refused(
    models: dict[str, Model],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0")
    argv = ["serve", str(models["tiny-gqa"].path), "--policy", "full"]
    line = _refusal([*argv, "--data-parallel-size", "2"], capsys)
    assert "VLLM_CPU_OMP_THREADS_BIND=0|1|0: names cores for 3 workers" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0,1,2,3,4"),
        ({"tensor_parallel_size": 2}, "0,1|2,3,4"),
        ({"data_parallel_size": 2}, "0,1|2,3,4"),
        ({"data_parallel_size": 8, "data_parallel_size_local": 2}, "0,1|2,3,4"),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, "0|1|2|3,4"),
        ({"tensor_parallel_size": 8}, "nobind"),
    ],
)
def test_every_worker_gets_cores_of_its_own(
    options: dict[str, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(5, None, monkeypatch)
    for before in (None, "0,1,2,3,4", "0,1|2,3,4"):  # as earlier engines left it
        monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
        if before is not None:
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", before)
        prepare_environment(options)
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == expected


def machine(visible: int, quota: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have cores; what is set for them lasts as long as the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(visible)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "_ASKED", "")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("options", "threads", "said"),
    [
        ({}, "4", "1 worker x 4 threads on 4 of 16 cores: the CPU quota is 4"),
        ({"data_parallel_size": 2}, "2", "2 workers x 2 threads on 4 of 16 cores: "),
        ({"tensor_parallel_size": 8}, "1", "8 workers x 1 thread on 4 of 16 cores: "),
    ],
)
def test_workers_share_the_quota_of_a_container(
    options: dict[str, int], threads: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(16, 4.0, monkeypatch)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    assert prepare_environment(options).startswith(said)
    assert os.environ["OMP_NUM_THREADS"] == threads
    # Another container may have chosen the first cores as well.
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(
    ("binding", "in_engine"), [("nobind", True), ("auto", True), ("2-3", False)]
)
def test_cores_that_the_user_names_are_those_of_a_worker_of_its_own(
    binding: str, in_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM binds the threads of worker processes alone."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    options = engine_options(_FULL, {})
    assert ("distributed_executor_backend" in options) == in_engine


def test_a_pool_too_small_for_one_request_names_both_flags(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refusal(
        [
            "plan",
            str(models["tiny-gqa"].path),
            "--policy",
            "full",
            "--kv-memory",
            "64k",
        ],
        capsys,
    )
    assert "--kv-cache-memory-bytes=65536" in line
    assert "--max-model-len" in line


def test_a_model_without_profile_is_named_with_the_way_to_get_one(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "retrieval"]
    line = _refusal([*argv, "--kv-memory", "1G"], capsys)
    assert "kvserve profile retrieval" in line


def test_a_profile_of_another_model_is_refused(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "retrieval"]
    other = f"profile={models['tiny-mha'].profile}"
    line = _refusal([*argv, "--policy-arg", other, "--kv-memory", "1G"], capsys)
    assert "is of another model" in line


def test_without_a_profile_the_default_policy_is_full_and_says_so(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(models["tiny-gqa"].path), "--kv-memory", "64M"]) == 0
    shown = capsys.readouterr().err
    assert "no profile ships" in shown
    assert "keep everything" in shown


def test_plan_knows_what_pages_hold_and_what_requests_may_name(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "sink-recent"]
    argv += ["--dtype", "float32", "--kv-memory", "64M"]
    said = []
    for own in ([], ["--kv-cache-dtype", "int8_per_token_head"]):
        assert main([*argv, *own]) == 0
        said.append(capsys.readouterr().out)
    width = models["tiny-gqa"].shape.head_size
    for shown, token in zip(said, (2 * width * 4, 2 * width + 8), strict=True):
        assert f"of {format_bytes(PAGE * token)} pages" in shown
    assert main([*argv, "--allow-request-policies"]) == 0
    assert "name a policy of its own" in capsys.readouterr().err


def test_plan_lays_policies_side_by_side(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--kv-memory", "64M"]
    argv += ["--max-model-len", "1024", "--policy", "h2o:budget=25%,norm=count"]
    argv += ["--policy", "sink-recent:budget=512"]
    assert main(argv) == 0
    header, *_, last = capsys.readouterr().out.strip().splitlines()[2:]
    assert header.split()[-2:] == [
        "h2o:budget=25%,norm=count",
        "sink-recent:budget=512",
    ]
    assert [word for word in last.split() if "%" in word] == ["25.0%", "50.0%"]
    assert main([*argv, "--policy-arg", "norm=none"]) == 2
    assert "--policy-arg norm=none: of which policy?" in capsys.readouterr().err


def test_plan_says_what_uneven_ranks_cost(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--policy", "retrieval", "--policy-arg", "full_ratio=0.1"]
    argv += ["--kv-memory", "512M", "--tensor-parallel-size", "3"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert "on each of 3 ranks" in shown.out
    # Of nine full heads one rank has five, and its share would be three.
    assert "of 3 ranks the one that holds most decides: 1.40 times" in shown.err


def test_plan_says_when_compression_cannot_help(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", str(models["tiny-gqa"].path), "--policy", "sink-recent"]
    assert main([*argv, "--kv-memory", "8G", "--max-num-seqs", "2"]) == 0
    assert "cannot raise throughput" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": 512,
            },
            "sliding-window",
        ),
        (
            {
                "architectures": ["MambaForCausalLM"],
                "model_type": "mamba",
                "state_size": 16,
                "conv_kernel": 4,
                "expand": 2,
                "intermediate_size": 256,
                "time_step_rank": 8,
            },
            "Mamba",
        ),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 64,
                "q_lora_rank": None,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 2,
            },
            "MLA",
        ),
    ],
)
def test_models_with_other_caches_are_refused(
    changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**_LLAMA, **changes}))
    options = engine_options(
        _FULL, {"model": str(tmp_path), "skip_tokenizer_init": True}
    )
    with pytest.raises(UserError, match=kind) as refusal:
        check_start(options)
    assert "\n" not in str(refusal.value)
