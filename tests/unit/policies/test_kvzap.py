# SPDX-License-Identifier: Apache-2.0
"""Scores that a network foretells: what it reads, and whose files it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from kvserve.errors import UserError
from policies import files
from policies.base import ModelShape
from policies.expected_attention import ExpectedAttention
from policies.keydiff import KeyDiff
from policies.kvzap import SCORER_FORMAT, KVzap
from policies.thinning import Groups

MODEL = ModelShape("toy", 2, 6, 3, 8, max_tokens=4096)
ABOUT = {
    "format": SCORER_FORMAT,
    "num_layers": "2",
    "num_query_heads": "6",
    "num_kv_heads": "3",
    "head_size": "8",
}


def tensors(layers: tuple[int, ...] = (0, 1)) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        # What divides inputs is positive; if all were, the network would say one thing.
        f"{layer}.{part}": torch.rand(*shape, generator=random)
        + (0.1 if part == "std" else -0.5)
        for layer in layers
        for part, shape in (
            ("mean", (48,)),
            ("std", (48,)),
            ("hidden.weight", (5, 48)),
            ("hidden.bias", (5,)),
            ("out.weight", (3, 5)),
            ("out.bias", (3,)),
        )
    }


def write(path: Path, layers: tuple[int, ...] = (0, 1), **about: str) -> str:
    save_file(tensors(layers), path, ABOUT | about)
    return str(path)


def groups() -> Groups:
    random = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(4, 3, 16, 8, generator=random) for _ in range(2))
    return Groups(keys, values, torch.arange(64).view(4, 16))


def standard(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean()) / scores.var(correction=0).sqrt()


def test_a_networks_guess_and_how_unusual_a_key_is_count_as_much(
    tmp_path: Path,
) -> None:
    policy, seen = KVzap(weights=write(tmp_path / "w.safetensors")), groups()
    for layer in range(2):
        part = {
            name.removeprefix(f"{layer}."): tensor
            for name, tensor in tensors().items()
            if name.startswith(f"{layer}.")
        }
        found = policy.scores(MODEL, layer, seen)
        unusual = KeyDiff().scores(MODEL, layer, seen)
        assert found.shape == (4, 3, 16)
        for group, head in ((0, 0), (2, 1), (3, 2)):
            guesses = []
            for token in range(16):
                one = torch.cat(
                    [seen.keys[group, :, token], seen.values[group, :, token]]
                ).flatten()
                hidden = part["hidden.weight"] @ ((one - part["mean"]) / part["std"])
                hidden = functional.gelu(hidden + part["hidden.bias"])
                guesses.append((part["out.weight"] @ hidden + part["out.bias"])[head])
            expected = standard(torch.stack(guesses)) + standard(unusual[group, head])
            torch.testing.assert_close(
                found[group, head], expected, rtol=1e-4, atol=1e-4
            )


def test_layers_are_the_models_own_numbers(tmp_path: Path) -> None:
    shape = ModelShape("toy", 1, 6, 3, 8, chosen=(1,), all_layers=2)
    both = write(tmp_path / "both.safetensors")
    only = KVzap(weights=write(tmp_path / "only.safetensors", layers=(1,)))
    only.budgets(shape, 4096)
    expected = KVzap(weights=both).scores(MODEL, 1, groups())
    found = KVzap(weights=both).scores(shape, 0, groups())
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="nothing for layer 0 of toy"):
        only.budgets(MODEL, 4096)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"format": "other/1"}, "malformed"),
        ({"num_layers": "two"}, "malformed"),
        ({"num_layers": "1"}, "another model: 1 layers x 6/3 query/KV heads of 8"),
        ({"num_kv_heads": "2"}, "is of another model"),
        ({"head_size": "16"}, "is of another model"),
    ],
)
def test_files_of_others_are_refused_in_one_line(
    tmp_path: Path, about: dict[str, str], said: str
) -> None:
    policy = KVzap(weights=write(tmp_path / "other.safetensors", **about))
    assert refusal(policy).startswith(f"--policy-arg weights={policy.weights}: ")
    assert said in refusal(policy)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10" + bytes(7) + b"{}" * 8])
def test_what_is_no_file_of_weights_is_refused_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    assert "malformed" in refusal(KVzap(weights=str(path)))
    assert "cannot be read" in refusal(KVzap(weights=str(tmp_path)))
    assert "no weights ship for toy" in refusal(KVzap())


def refusal(policy: KVzap) -> str:
    with pytest.raises(UserError) as caught:
        policy.budgets(MODEL, 4096)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_weights_are_read_once_and_named_to_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    policy = KVzap(weights=write(path))
    assert policy.files("toy") == {"weights": path}
    before = policy.scores(MODEL, 0, groups())
    monkeypatch.setattr(Path, "read_bytes", fail)
    torch.testing.assert_close(policy.scores(MODEL, 0, groups()), before)
    assert str(path) in files.digests()


def fail(*_: Any) -> bytes:
    raise AssertionError("read again")


def test_what_ships_is_of_the_embedded_model() -> None:
    shape = ModelShape("SmolLM2-135M-Instruct", 30, 9, 3, 64, max_tokens=4096)
    for policy in (KVzap(budget=0.125), ExpectedAttention(budget=0.125)):
        keeps = [head.keep for layer in policy.budgets(shape, 4096) for head in layer]
        assert min(keeps) == 0
        assert max(keeps) > 100
        random = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(2, 3, 128, 64, generator=random) for _ in range(2))
        found = policy.scores(shape, 29, Groups(keys, values, torch.zeros(2, 128)))
        assert found.isfinite().all()
        sizes = [path.stat().st_size for path in policy.files(shape.name).values()]
        assert len(sizes) == 2
        assert sum(sizes) < 8 << 20
