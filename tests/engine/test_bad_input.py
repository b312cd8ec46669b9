# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in one line, before anything has started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvserve.cli import main
from kvserve.engine.settings import PolicySettings
from kvserve.engine.start.options import engine_options
from kvserve.engine.start.preflight import check_start
from kvserve.errors import UserError
from tests.engine.conftest import Model
from tests.engine.families import FAMILIES

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
        (
            ["--policy", "keydiff:budget=12.5%..50%"],
            "goes from the largest budget down to the least",
        ),
        (["--policy", "keydiff:budget=50%.."], "for a server a range such as"),
        (["--policy", "keydiff:budget=50%..512"], "give two shares, or tokens twice"),
        (["--policy", "full:budget=100%..50%"], "takes no budget; leave budget= out"),
        (
            ["--policy", "h2o:budget=50%..25%"],
            "--policy h2o: holds a full cache while it reads",
        ),
        (
            ["--policy", "sink-recent:budget=50%..25%", "--scheduler-cls", "my.Own"],
            "--scheduler-cls=my.Own: --policy sink-recent:budget=50%..25% runs under",
        ),
        (
            [
                *("--policy", "sink-recent:budget=50%..25%"),
                *("--kv-cache-memory-bytes", "64k"),
            ],
            "under this policy; give more memory",
        ),
        (
            [
                *("--policy", "keydiff:budget=75%..50%"),
                *("--tensor-parallel-size", "2"),
            ],
            "--tensor-parallel-size=2: heads of a layer would lie on different ranks, "
            "and policy keydiff",
        ),
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
            "--scheduler-cls=my.Scheduler: --enable-prefix-caching runs under",
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
                '{"method": "eagle", "model": "x", "num_speculative_tokens": 2}',
            ],
            "--speculative-config: under a policy guesses come from ngram",
        ),
        (
            [
                *("--policy", "h2o", "--speculative-config"),
                '{"method": "ngram", "num_speculative_tokens": 2}',
            ],
            "--speculative-config: --policy h2o cannot take back",
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


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
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


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("gemma3", {"sliding_window": -5}, "sliding_window=-5"),
        ("gemma3", {"sliding_window": "wide"}, "sliding_window"),
        ("gemma3", {"layer_types": ["sliding_attention"]}, "layer_type"),
        ("llama4", {"attention_chunk_size": -32}, "attention_chunk_size=-32"),
        ("llama4", {"attention_chunk_size": 50}, "no whole number of pages"),
        ("gemma3n", {"num_kv_shared_layers": 6}, "num_kv_shared_layers=6"),
        ("gemma3n", {"num_kv_shared_layers": -1}, "num_kv_shared_layers=-1"),
        ("granite4", {"layer_types": ["mamba"] * 4}, "no attention"),
        (
            "gemma4-unequal",
            {"per_layer_config": {"2": {"head_dim": 80}, "5": {"head_dim": 80}}},
            "2 heads of 32 numbers do not fit into pages for heads of 80",
        ),
    ],
)
def test_what_no_layers_can_be_is_refused_in_one_line(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert told in refusal_of(name, changes, tmp_path)


def test_windows_that_no_request_outgrows_make_unequal_heads_open(
    tmp_path: Path,
) -> None:
    said = refusal_of("gemma4-unequal", {}, tmp_path, max_model_len=40)
    assert "--max-model-len" in said


def refusal_of(name: str, changes: dict[str, Any], parent: Path, **options: Any) -> str:
    """What is said of a family's model whose configuration was changed."""
    (family,) = (one for one in FAMILIES if one.name == name)
    config = family.write(parent) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    asked = {"model": str(config.parent), "skip_tokenizer_init": True, **options}
    with pytest.raises(UserError) as refusal:
        check_start(engine_options(_FULL, {"max_model_len": 1024, **asked}))
    said = str(refusal.value)
    assert "\n" not in said
    return said
