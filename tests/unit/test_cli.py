# SPDX-License-Identifier: Apache-2.0
"""The command, as far as it goes without vLLM."""

from __future__ import annotations

import pytest

from kvserve.cli import main
from kvserve.errors import UserError
from kvserve.units import format_bytes, parse_bytes
from policies.registry import available_policies


def test_no_command_shows_usage_and_exits_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_unknown_command_is_one_line_that_names_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sevre"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "sevre" in message
    assert "serve" in message


def test_policies_lists_every_policy_with_its_parameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["policies"]) == 0
    shown = capsys.readouterr().out
    for name, cls in available_policies().items():
        assert name in shown
        assert cls.paper in shown
    assert "full_ratio = 0.2 (0.0 to 1.0)" in shown
    assert "streaming-llm (alias of sink-recent)" in shown
    assert "kvzap:budget=50%..12.5%" in shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("1k", 1024), ("512MiB", 512 << 20), ("1.5 GB", 3 << 29)],
)
def test_sizes_are_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text, "--kv-memory") == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "5Q", "1e3", "nan"])
def test_a_bad_size_names_the_flag(text: str) -> None:
    with pytest.raises(UserError, match="--kv-memory"):
        parse_bytes(text, "--kv-memory")


def test_sizes_are_written_with_three_digits() -> None:
    assert format_bytes(8192) == "8 KiB"
    assert format_bytes(188_743_680) == "180 MiB"
    assert format_bytes(3 << 42) == "12 TiB"
