# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is hidden where, that it fits, and that seeds decide everything."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.errors import UserError
from kvserve.evaluation.backend import Reply, Request
from kvserve.evaluation.catalogue import built_in
from kvserve.evaluation.continuations import (
    Reference,
    divergence,
    mean_divergence,
    nll,
    top1_share,
)
from kvserve.evaluation.prompts import WORDS
from kvserve.evaluation.tasks import Sample
from kvserve.evaluation.user_task import load_user_task, read_questions
from kvserve.texts.families import PROFILING
from kvserve.texts.haystack import load_book
from tests.unit.byte_tokenizer import byte_tokenizer

TASKS = built_in()
LENGTH = 4000
DIGESTS = {
    "needle": "83a26126534c",
    "multikey": "af2fe5a24026",
    "multivalue": "d1dfc786bc37",
    "tracking": "3389ccb137f3",
    "counting": "ac585fb21571",
    "second-turn": "da5d1e90ef34",
    "niah_single_1": "d86e6cef1e42",
    "niah_single_2": "a75de416b4da",
    "niah_single_3": "83d162c29734",
    "niah_multikey_1": "ed7ae361faf1",
    "niah_multikey_2": "98453221c0bd",
    "niah_multikey_3": "07b67b4447ed",
    "niah_multivalue": "79743bc4a5f2",
    "niah_multiquery": "f5521c4cb9a7",
    "vt": "d2fa5d3902a3",
    "cwe": "e2c1b3042106",
    "fwe": "8165d8df30e7",
    "qa_1": "1c369364e0bc",
    "qa_2": "a671e427d32e",
    "long-copy": "49a1a095ded3",
    "long-count": "45da2f11d3f6",
    "instructions": "43510bc7a41e",
    "leak": "962bfc2e8cb0",
    "system-facts": "a66a146df297",
    "perplexity": "b44b267403a8",
    "agreement": "0fb2dcf674d7",
}
NAMES = pytest.mark.parametrize("name", list(TASKS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chatty() -> Any:
    """A tokenizer whose model has turns."""
    made = byte_tokenizer()
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


def make(
    name: str, tokenizer: Any, seed: int = 0, length: int = LENGTH
) -> list[Sample]:
    return TASKS[name].samples(tokenizer, load_book("persuasion"), seed, length, 4)


@functools.cache
def made(name: str, tokenizer: Any) -> list[Sample]:
    """What most tests look at, made once."""
    return make(name, tokenizer)


@NAMES
def test_a_request_fills_its_length_and_is_never_longer(
    name: str, tokenizer: Any, chatty: Any
) -> None:
    for one in (tokenizer, chatty):
        for sample in made(name, one):
            assert 0.9 * LENGTH <= sample.request.tokens <= LENGTH


@NAMES
def test_a_seed_gives_the_same_requests_and_another_seed_others(
    name: str, tokenizer: Any
) -> None:
    first, again, other = (make(name, tokenizer, seed) for seed in (3, 3, 4))
    assert first == again
    assert all(a.request != b.request for a, b in zip(first, other, strict=True))
    assert len({tuple(sample.request.prompt) for sample in first}) == len(first)


def test_prompts_are_the_same_on_every_machine(tokenizer: Any) -> None:
    digests = {
        name: hashlib.sha256(
            json.dumps(
                [[s.request.prompt, s.request.forced] for s in made(name, tokenizer)]
            ).encode()
        ).hexdigest()[:12]
        for name in TASKS
    }
    assert digests == DIGESTS


@NAMES
def test_answers_lie_in_the_context_and_depths_where_they_are_said(
    name: str, tokenizer: Any
) -> None:
    for sample in made(name, tokenizer):
        prompt = tokenizer.decode(sample.request.prompt)
        for answer in sample.answers:
            assert answer in prompt
        if sample.depth is not None:
            at = prompt.index(sample.answers[0]) / prompt.rindex("\n\n")
            assert at == pytest.approx(sample.depth, abs=0.15)


@NAMES
def test_a_length_without_room_is_refused_with_task_and_length(
    name: str, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=rf"--task {name} --length 130: .*") as raised:
        make(name, tokenizer, length=130)
    assert "\n" not in str(raised.value)


def test_multikey_hides_four_keys_of_one_form(tokenizer: Any) -> None:
    for sample in made("multikey", tokenizer):
        prompt = tokenizer.decode(sample.request.prompt)
        assert prompt.count("One of the special magic numbers for") == 5
        assert sample.score(f"It is {sample.answers[0]}.") == 1
        assert sample.score("It is 1.") == 0


def test_multivalue_scores_the_share_of_values_found(tokenizer: Any) -> None:
    sample = made("multivalue", tokenizer)[0]
    assert len(sample.answers) == 4
    assert sample.score(" and ".join(sample.answers[:3])) == 0.75


def test_tracking_hides_a_chain_in_its_order(tokenizer: Any) -> None:
    for sample in made("tracking", tokenizer):
        prompt = tokenizer.decode(sample.request.prompt)
        places = [prompt.index(f"VAR {name} = ") for name in sample.answers]
        assert places == sorted(places)
        links = zip(sample.answers, sample.answers[1:], strict=False)
        assert all(f"VAR {b} = VAR {a}." in prompt for a, b in links)


def test_counting_lists_its_answers_ten_times_as_often(tokenizer: Any) -> None:
    for sample in made("counting", tokenizer):
        listed = tokenizer.decode(sample.request.prompt).split("\n")[0].split()[1::2]
        common = [listed.count(word) for word in sample.answers]
        others = [listed.count(word) for word in set(listed) - set(sample.answers)]
        assert others
        assert min(common) >= 10 * max(others)


def test_second_turn_forces_the_first_answer_and_asks_for_the_other(
    chatty: Any,
) -> None:
    for sample in made("second-turn", chatty):
        prompt = chatty.decode(sample.request.prompt)
        forced = chatty.decode(sample.request.forced)
        said = forced.split(".")[0].strip()
        assert said in prompt
        assert said not in sample.answers
        assert forced.count("[user]") == 1
        assert sample.answers[0] not in forced
        assert forced.endswith(" is:")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = byte_tokenizer()
    rewriting.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leave second-turn out"):
        make("second-turn", rewriting)


def test_words_are_not_those_that_profiles_were_measured_with() -> None:
    theirs = {word.lower() for words in PROFILING.words.values() for word in words}
    assert len(set(WORDS)) == len(WORDS) >= 100
    assert not theirs & set(WORDS)


def test_nll_is_the_mean_over_tokens() -> None:
    reply = Reply("", [1, 2], [math.log(0.5), math.log(0.25)])
    assert nll(reply) == pytest.approx(1.5 * math.log(2))


def logs(**shares: float) -> dict[int, float]:
    return {int(name[1:]): math.log(share) for name, share in shares.items()}


def test_divergence_of_whole_distributions_is_the_textbooks() -> None:
    ours, theirs = logs(t1=0.5, t2=0.5), logs(t1=0.25, t2=0.75)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(ours, theirs) == pytest.approx(expected, abs=1e-5)
    assert divergence(ours, ours) == 0


@given(
    st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
)
def test_what_is_seen_of_two_distributions_never_exceeds_their_divergence(
    first: list[float], second: list[float]
) -> None:
    p = [value / sum(first) for value in first]
    q = [value / sum(second) for value in second]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def likeliest(shares: list[float]) -> dict[int, float]:
        ranked = sorted(enumerate(shares), key=lambda one: -one[1])[:3]
        return {token: math.log(share) for token, share in ranked}

    assert divergence(likeliest(p), likeliest(q)) <= whole + 1e-4


def test_agreement_counts_equal_likeliest_tokens() -> None:
    reference = Reference([1, 1], [logs(t1=0.9, t2=0.1), logs(t1=0.9, t2=0.1)])
    reply = Reply("", [1, 1], [], [logs(t1=0.8, t2=0.2), logs(t1=0.2, t2=0.8)])
    assert top1_share(reference, reply) == 0.5
    assert mean_divergence(reference, reply) > 0
    assert Reference.from_json(json.loads(json.dumps(reference.to_json()))).token_ids


def test_a_reference_forces_its_own_reply() -> None:
    request = Request([1, 2], reply=8, top=20)
    forced = Reference([5, 6], []).force(request)
    assert (forced.forced, forced.reply, forced.prompt) == ([5, 6], 0, [1, 2])


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_users_questions_are_a_task_named_after_their_file(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        '{"prompt": "Who?", "answer": "Anne"}',
        "",
        '{"prompt": "Which two?", "answer": ["red", "blue"]}',
    )
    user = load_user_task(path, tokenizer)
    assert user.task.name == "mine"
    assert [sample.answers for sample in user.samples] == [("Anne",), ("red", "blue")]
    assert user.samples[1].score("blue, and Red") == 1
    assert user.mean_length <= max(sample.request.tokens for sample in user.samples)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is not an object"),
        ('{"answer": "a"}', "line 2: has no prompt"),
        ('{"prompt": "", "answer": "a"}', "line 2: has no prompt"),
        ('{"prompt": "p"}', "line 2: has no answer"),
        ('{"prompt": "p", "answer": []}', "line 2: has no answer"),
        ('{"prompt": "p", "answer": [""]}', "line 2: has no answer"),
        ('{"prompt": "p", "answer": 4}', "line 2: has no answer"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"prompt": "p", "answer": "a"}', line)
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_an_empty_or_missing_file_of_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no line; expected {.prompt"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
