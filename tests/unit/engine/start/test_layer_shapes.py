# SPDX-License-Identifier: Apache-2.0
"""Layers of another shape than the one that pages were planned for are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from kvserve.engine.start import layers as model_layers
from kvserve.engine.start.layers import check_layers
from kvserve.errors import UserError
from policies.base import Local, ModelShape

LAYERS, QUERY, KV, SIZE = 3, 8, 4, 64
LONGEST = 512
PLANNED = "3 layers, 8 query heads, 4 KV heads, 64 numbers a head"


def attention(**changed: Any) -> Attention:
    """A layer as far as it is looked at."""
    found: Any = SimpleNamespace(
        **{
            "attn_type": AttentionType.DECODER,
            "sliding_window": None,
            "kv_sharing_target_layer_name": None,
            "impl": None,
            "num_heads": QUERY,
            "num_kv_heads": KV,
            "head_size": SIZE,
            "head_size_v": SIZE,
            **changed,
        }
    )
    return found


def refusal(layers: list[Attention], ranks: int = 1) -> str | None:
    """What is said of a model with such layers on a rank; ``None``: it is served."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="some/model", max_model_len=LONGEST),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    named = {f"layers.{place}": layer for place, layer in enumerate(layers)}
    try:
        check_layers(config, named)
    except UserError as error:
        return str(error)
    return None


def assert_refused(layers: list[Attention], told: str) -> None:
    """See that one line begins as ``told`` and ends with the way out."""
    said = refusal(layers)
    assert said is not None
    assert said.startswith(told)
    assert "--policy none" in said
    assert "\n" not in said


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch)


def plan(monkeypatch: pytest.MonkeyPatch, *local: Local | None, **more: Any) -> None:
    shape = ModelShape("model", LAYERS, QUERY, KV, SIZE, local=local, **more)
    monkeypatch.setattr(model_layers, "model_shape_of", lambda _: shape)


WINDOW, CHUNK = Local(128), Local(96, is_chunk=True)
SLIDES, IN_CHUNKS = attention(sliding_window=128), attention(attention_chunk_size=96)


def test_windows_and_chunks_as_planned_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan(monkeypatch, WINDOW, None, CHUNK)
    assert refusal([SLIDES, attention(), IN_CHUNKS]) is None


def test_a_window_that_no_request_outgrows_is_everything() -> None:
    assert refusal([attention(sliding_window=LONGEST)] * LAYERS) is None


@pytest.mark.parametrize(
    ("local", "layers", "told"),
    [
        (
            (),
            [attention(), SLIDES, attention()],
            "1 sees everything, but it sees a win",
        ),
        ((WINDOW, None, None), [attention()] * 3, "0 sees a window of 128 tokens, but"),
        (
            (WINDOW, Local(129), None),
            [SLIDES, SLIDES, attention()],
            "1 sees a window of 129 tokens, but it sees a window of 128 tokens; ",
        ),
        (
            (WINDOW, CHUNK, None),
            [SLIDES, SLIDES, attention()],
            "1 sees a chunk of 96 tokens, but it sees a window of 128 tokens; ",
        ),
    ],
)
def test_what_layers_see_must_be_what_was_planned(
    monkeypatch: pytest.MonkeyPatch,
    local: tuple[Local | None, ...],
    layers: list[Attention],
    told: str,
) -> None:
    plan(monkeypatch, *local)
    assert_refused(layers, f"MODEL some/model: by its configuration layer {told}")


def test_layers_as_planned_are_served() -> None:
    assert refusal([attention()] * LAYERS) is None


@pytest.mark.parametrize(("ranks", "query", "kv"), [(2, 4, 2), (4, 2, 1), (8, 1, 1)])
def test_each_rank_has_its_share(ranks: int, query: int, kv: int) -> None:
    share = attention(num_heads=query, num_kv_heads=kv)
    assert refusal([share] * LAYERS, ranks) is None
    whole = refusal([attention()] * LAYERS, ranks)
    assert whole is not None
    assert f"tells of 3 layers, {query} query heads, {kv} KV heads, 64 num" in whole


@pytest.mark.parametrize(
    ("layers", "has"),
    [
        (
            [attention()] * (LAYERS - 1),
            "2 layers, 8 query heads, 4 KV heads, 64 numbers a head",
        ),
        (
            [attention()] * (LAYERS + 1),
            "4 layers, 8 query heads, 4 KV heads, 64 numbers a head",
        ),
        (
            [attention(), attention(num_kv_heads=2), attention()],
            "2 layers, 8 query heads, 4 KV heads, 64 numbers a head and "
            "1 layers, 8 query heads, 2 KV heads, 64 numbers a head",
        ),
        (
            [attention(num_heads=16)] * LAYERS,
            "3 layers, 16 query heads, 4 KV heads, 64 numbers a head",
        ),
        (
            [attention(num_kv_heads=8)] * LAYERS,  # as MiniCPM3's configuration has it
            "3 layers, 8 query heads, 8 KV heads, 64 numbers a head",
        ),
        (
            [attention(num_kv_heads=1)] * LAYERS,
            "3 layers, 8 query heads, 1 KV heads, 64 numbers a head",
        ),
        (
            [attention(head_size=96, head_size_v=96)] * LAYERS,
            "3 layers, 8 query heads, 4 KV heads, 96 numbers a head",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_configuration_does_not_tell_is_refused(
    layers: list[Attention], has: str
) -> None:
    told = f"MODEL some/model: its configuration tells of {PLANNED}, but it has {has}; "
    assert_refused(layers, told)


UNEQUAL = ((4, 64), (4, 64), (2, 128))


def test_heads_of_unequal_number_and_size_as_planned_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan(monkeypatch, layer_heads=UNEQUAL)
    large = attention(num_kv_heads=2, head_size=128, head_size_v=128)
    assert refusal([attention(), attention(), large]) is None
    assert refusal([attention()] * LAYERS) is not None


SHARES = attention(kv_sharing_target_layer_name="layers.1")


def test_a_layer_may_read_the_cache_that_was_planned_to_be_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [attention()] * LAYERS
    assert_refused([*own, SHARES], "MODEL some/model: by its configuration layers []")
    plan(monkeypatch, reread=(1,))
    assert refusal([*own, SHARES]) is None
    assert_refused(own, "MODEL some/model: by its configuration layers [1] are read")
    narrow = attention(kv_sharing_target_layer_name="layers.1", sliding_window=9)
    assert_refused([*own, narrow], "MODEL some/model: layer 3 sees another window")


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ([], "no attention"),
        ([attention(head_size_v=32)] * LAYERS, "unequal key and value"),
        (
            [attention(attn_type=AttentionType.ENCODER_ONLY)] * LAYERS,
            "encoder_only attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_paged_are_named(
    layers: list[Attention], kind: str
) -> None:
    assert_refused(layers, f"MODEL some/model: has {kind} layers")
