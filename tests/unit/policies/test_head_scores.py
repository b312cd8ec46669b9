# SPDX-License-Identifier: Apache-2.0
"""Files of head scores: three formats, and what is wrong with those we refuse."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from policies.base import ModelShape
from policies.head_scores import PROFILE_FORMAT, load_head_scores, top_heads

MODEL = ModelShape("toy", num_layers=2, num_query_heads=4, num_kv_heads=2, head_size=8)


def write(folder: Path, text: str) -> str:
    path = folder / "scores"
    path.write_text(text)
    return str(path)


def own_json(scores: object) -> str:
    return json.dumps({"format": PROFILE_FORMAT, "kv_head_scores": scores})


def query_head_json(samples: dict[tuple[int, int], list[float]]) -> str:
    """Build the Retrieval Head authors' JSON, heads without samples at 0."""
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    scores = {
        f"{layer}-{head}": samples.get((layer, head), [0.0]) for layer, head in heads
    }
    return json.dumps(scores)


def refusal(folder: Path, text: str) -> str:
    """Load a bad file; return the error, which must be one line naming the file."""
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        load_head_scores(path, MODEL)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--policy-arg profile={path}: ")
    return message


def test_own_json_holds_one_score_per_kv_head(tmp_path: Path) -> None:
    scores = [[0.1, 0.9], [1, 0]]
    assert load_head_scores(write(tmp_path, own_json(scores)), MODEL) == scores


def test_own_json_may_say_more_than_the_scores(tmp_path: Path) -> None:
    profile = {"format": PROFILE_FORMAT, "model": "toy", "kv_head_scores": [[0, 1]] * 2}
    path = write(tmp_path, json.dumps(profile, indent=2))
    assert load_head_scores(path, MODEL) == [[0, 1]] * 2


def test_a_kv_head_takes_the_best_mean_of_its_query_heads(tmp_path: Path) -> None:
    samples = {(0, 1): [0.2, 0.4], (0, 0): [0.25], (1, 3): [1.0, 0.0, 0.5]}
    path = write(tmp_path, query_head_json(samples))
    assert load_head_scores(path, MODEL) == [
        [pytest.approx(0.3), 0.0],
        [0.0, pytest.approx(0.5)],
    ]


def test_duo_attention_gates_are_clipped(tmp_path: Path) -> None:
    path = write(tmp_path, "-0.25\t0.5\n1.75\t1.0\n")
    assert load_head_scores(path, MODEL) == [[0.0, 0.5], [1.0, 1.0]]


def test_blank_lines_between_gates_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "\n0.1\t0.5\n\n0.75\t1e-3\n\n")
    assert load_head_scores(path, MODEL) == [[0.1, 0.5], [0.75, 0.001]]


def test_a_path_may_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "0\t1\n1\t0\n")
    assert load_head_scores("~/scores", MODEL) == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (own_json([[0.5] * 2] * 3), "3 layers x 2 KV heads"),
        (own_json([[0.5] * 3] * 2), "2 layers x 3 KV heads"),
        (own_json([[0.5], [0.5, 0.5]]), "2 layers x 1/2 KV heads"),
        (own_json([]), "0 layers x no KV heads"),
        ("0.5\t0.5\t0.5\n" * 2, "2 layers x 3 KV heads"),
        ("0.5\t0.5\n" * 5, "5 layers x 2 KV heads"),
        ("", "0 layers x no KV heads"),
        ('{"0-3": [1.0], "2-0": [0.5]}', "3 layers x 4 query heads"),
        ('{"0-4": [1.0], "1-0": [0.5]}', "2 layers x 5 query heads"),
        ("{}", "0 layers x 0 query heads"),
    ],
)
def test_scores_of_other_shape_are_of_another_model(
    tmp_path: Path, text: str, found: str
) -> None:
    message = refusal(tmp_path, text)
    assert f"is of another model: {found}, but toy has 2 layers" in message


@pytest.mark.parametrize("bad", ["nan", "NaN", "inf", "-inf"])
def test_gates_that_are_not_finite_are_refused(tmp_path: Path, bad: str) -> None:
    assert "finite" in refusal(tmp_path, f"0.5\t0.5\n{bad}\t0.5\n")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_json_scores_that_are_not_finite_are_refused(
    tmp_path: Path, bad: float
) -> None:
    assert "finite" in refusal(tmp_path, own_json([[0.5, bad], [0.5, 0.5]]))
    assert "finite" in refusal(tmp_path, query_head_json({(0, 2): [0.5, bad]}))


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "kvserve-retrieval/1"',
        '{"format": "kvserve-retrieval/1"}',
        '{"format": "kvserve-retrieval/2", "kv_head_scores": [[0, 1], [1, 0]]}',
        own_json(None),
        own_json([0.5, 0.5]),
        own_json([["a", 1], [1, 0]]),
        own_json([[None, 1], [1, 0]]),
        own_json([[10**400, 1], [1, 0]]),
        '{"layer 0": [1.0], "1-3": [1.0]}',
        '{"0-0-0": [1.0], "1-3": [1.0]}',
        '{"0-0": 1.0, "1-3": [1.0]}',
        '{"0-0": [], "1-3": [1.0]}',
        '{"0-0": ["a"], "1-3": [1.0]}',
        "[[0, 1], [1, 0]]",
        "0.5,0.5\n0.5,0.5\n",
        "0.5\tx\n0.5\t0.5\n",
        "just some words",
    ],
)
def test_malformed_files_are_refused_with_the_formats_we_read(
    tmp_path: Path, text: str
) -> None:
    message = refusal(tmp_path, text)
    assert "malformed (" in message
    assert "DuoAttention TSV" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_head_scores(str(path), MODEL)
    assert str(caught.value).startswith(f"--policy-arg profile={path}: ")


def test_a_folder_or_binary_file_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, binary):
        with pytest.raises(UserError, match=r"^--policy-arg profile=.*cannot be read"):
            load_head_scores(str(path), MODEL)


def test_without_a_file_an_unknown_model_is_told_how_to_make_one() -> None:
    with pytest.raises(UserError) as caught:
        load_head_scores(None, MODEL)
    message = str(caught.value)
    assert "\n" not in message
    assert "no profile ships for toy" in message
    assert "--policy-arg profile=FILE" in message


def test_top_heads_are_the_best_of_all_layers_jointly() -> None:
    scores = [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]
    assert top_heads(scores, 0.5) == {(1, 0), (1, 1), (1, 2)}


def test_ties_go_to_the_lower_layer_then_the_lower_head() -> None:
    scores = [[0.5, 0.1, 0.5], [0.5, 0.9, 0.5]]
    assert top_heads(scores, 3 / 6) == {(1, 1), (0, 0), (0, 2)}
    assert top_heads(scores, 4 / 6) == {(1, 1), (0, 0), (0, 2), (1, 0)}


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1),
    st.floats(0, 1),
)
def test_as_many_heads_are_chosen_as_the_ratio_says(
    scores: list[list[float]], ratio: float
) -> None:
    chosen = top_heads(scores, ratio)
    heads = [(layer, head) for layer in range(len(scores)) for head in range(3)]
    assert len(chosen) == round(ratio * len(heads))
    others = [
        scores[layer][head] for layer, head in heads if (layer, head) not in chosen
    ]
    best_left_out = max(others, default=0.0)
    assert all(scores[layer][head] >= best_left_out for layer, head in chosen)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1))
def test_a_larger_ratio_only_adds_heads(scores: list[list[float]]) -> None:
    chosen = [top_heads(scores, tenths / 10) for tenths in range(11)]
    assert all(fewer <= more for fewer, more in pairwise(chosen))


def test_query_head_scores_that_lack_a_head_are_malformed(tmp_path: Path) -> None:
    scores = json.loads(query_head_json({(0, 1): [0.5]}))
    del scores["1-2"]
    assert "it lacks some heads" in refusal(tmp_path, json.dumps(scores))
