# SPDX-License-Identifier: Apache-2.0
"""Running, keeping and resuming cells, with engines that answer at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvserve.errors import UserError
from kvserve.evaluation.engine import FirstTokens
from kvserve.evaluation.runner import Runner
from kvserve.evaluation.store import FILE, Store
from tests.unit.fake_backend import FakeContender, assignment

CONDITIONS = {"seed": 0, "samples": 4}


def open_store(path: Path, **conditions: int) -> Store:
    return Store(path, {**CONDITIONS, **conditions})


def test_one_engine_serves_all_cells_of_equal_arguments(tmp_path: Path) -> None:
    one = FakeContender("a", right=4)
    other = FakeContender("b", right=2, by_length=True)
    work = [assignment(64), assignment(128), assignment(128, name="more")]
    Runner(work, open_store(tmp_path), show=False).run([one, other])
    assert one.log == ["open", "run 4", "run 4", "run 4", "close"]
    assert other.log == ["open", "run 4", "close", "open", "run 4", "run 4", "close"]


def test_cells_hold_scores_replies_depths_and_pages(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    contender = FakeContender("a", right=3, held=25)
    Runner([assignment(64)], store, show=False).run([contender])
    cell = store.cells["a", "task", 64]
    assert cell.scores == [1, 1, 1, 0]
    assert cell.replies == ["yes", "yes", "yes", "no"]
    assert cell.depths == [0.5] * 4
    assert (cell.pages_held, cell.pages_peak) == ([25] * 4, [50] * 4)
    assert (cell.pages_full, cell.page_bytes) == ([100] * 4, 1024)


def test_times_are_kept_beside_cells_which_are_the_same_in_every_run(
    tmp_path: Path,
) -> None:
    Runner([assignment(64)], open_store(tmp_path), show=False).run(
        [FakeContender("a", right=4)]
    )
    record = json.loads((tmp_path / FILE).read_text().splitlines()[1])
    assert "timing" not in record["cell"]
    timing = open_store(tmp_path).cells["a", "task", 64].timing
    assert timing is not None
    assert timing.seconds > 0
    assert timing.tokens == 4 * 4
    assert timing.first_after == [0.5] * 4


def test_lengths_that_a_policy_cannot_have_are_left_out(tmp_path: Path) -> None:
    contender = FakeContender("a", right=4, without=frozenset({64}))
    store = open_store(tmp_path)
    Runner([assignment(64), assignment(128)], store, show=False).run([contender])
    assert list(store.cells) == [("a", "task", 128)]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    done, stopped = FakeContender("a", right=4), FakeContender("b", right=4, fails=True)
    with pytest.raises(KeyboardInterrupt):
        Runner([assignment()], open_store(tmp_path), show=False).run([done, stopped])
    stopped.fails = False
    store = open_store(tmp_path)
    Runner([assignment()], store, show=False).run([done, stopped])
    assert done.log.count("open") == 1
    assert stopped.log == ["open", "run 4", "close"]
    assert [key[0] for key in store.cells] == ["a", "b"]


def test_an_engine_is_closed_when_a_run_fails(tmp_path: Path) -> None:
    contender = FakeContender("a", right=4)
    with pytest.raises(UserError, match="--policy full"):
        Runner([assignment(kind="agreement")], open_store(tmp_path), show=False).run(
            [contender]
        )
    assert contender.log == ["open", "close"]


def test_half_a_line_of_a_killed_run_is_measured_again(tmp_path: Path) -> None:
    Runner([assignment()], open_store(tmp_path), show=False).run(
        [FakeContender("a", 4), FakeContender("b", 4)]
    )
    path = tmp_path / FILE
    path.write_text(path.read_text()[:-40])
    store = open_store(tmp_path)
    assert [key[0] for key in store.cells] == ["a"]
    again = FakeContender("b", 4)
    Runner([assignment()], store, show=False).run([again])
    assert again.log
    store.close()
    assert len(open_store(tmp_path).cells) == 2


def test_other_conditions_are_refused_and_named(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with pytest.raises(UserError, match="results with seed 0, and this command has 1"):
        open_store(tmp_path, seed=1)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*cannot be used"):
        open_store(tmp_path / "file")


def test_agreement_compares_with_what_the_full_cache_said(tmp_path: Path) -> None:
    work = [assignment(kind="agreement")]
    full, other = FakeContender("full", right=4), FakeContender("a", right=3)
    store = open_store(tmp_path)
    # The reference goes first, whatever the order.
    Runner(work, store, show=False).run([other, full])
    assert full.log == ["open", "run 4", "run 4", "close"]
    assert store.cells["full", "task", 64].scores == [1, 1, 1, 1]
    assert store.cells["a", "task", 64].scores == [1, 1, 1, 0]
    assert store.cells["a", "task", 64].divergences[3] > 0
    store.close()
    later = FakeContender("b", right=4)
    Runner(work, open_store(tmp_path), show=False).run([later])
    assert later.log == ["open", "run 4", "close"]


def test_perplexity_scores_are_nats_a_token(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    Runner([assignment(kind="perplexity")], store, show=False).run(
        [FakeContender("a", 4)]
    )
    assert store.cells["a", "task", 64].scores == [1.0] * 4


def test_the_bar_counts_tokens_that_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)
    work = [assignment(64), assignment(128)]
    Runner(work, store).run([FakeContender("a", 4)])
    assert "56.0/56.0" in capsys.readouterr().err
    Runner(work, store).run([FakeContender("a", 4)])
    assert capsys.readouterr().err == ""


def test_the_file_says_its_conditions_first(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    first = (tmp_path / FILE).read_text().splitlines()[0]
    assert json.loads(first) == {"conditions": CONDITIONS}


def test_the_first_token_is_timed_from_the_step_that_lets_a_request_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    waiting = SimpleNamespace(num_computed_tokens=0, num_output_tokens=0)
    running = SimpleNamespace(num_computed_tokens=32, num_output_tokens=0)
    scheduler = SimpleNamespace(requests={"a": running, "b": waiting})
    clock = FirstTokens(scheduler)
    clock.start()
    clock.note()
    running.num_output_tokens = waiting.num_computed_tokens = 1
    clock.start()
    clock.note()
    # Both end in the next step, b with its first token.
    clock.start()
    scheduler.requests = {}
    clock.note()
    assert clock.close("a") == 5.0 - 1.0
    assert clock.close("b") == 8.0 - 3.0
