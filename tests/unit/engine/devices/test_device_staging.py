# SPDX-License-Identifier: Apache-2.0
"""What a GPU's kernels read is what the host worked out, wherever it was kept."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvserve.engine.batch.page_tables import PageTables
from kvserve.engine.batch.rows import RowBuilder, StepRows
from kvserve.plan.blocks import blocks_of
from kvserve.plan.page_plan import PagePlan
from tests.unit.simulator import (
    FULL_LANE,
    Batch,
    Scheduler,
    make_plan,
    plans,
    refresh,
    seeds,
)

pytest.importorskip("triton")
from kvserve.engine.devices.gpu import TritonDevice
from kvserve.engine.devices.gpu_staging import DeviceStaging
from kvserve.engine.devices.mirror import TableMirror
from kvserve.engine.devices.staging import StagedRows
from kvserve.engine.devices.uploads import Buffer, upload_all

CPU = torch.device("cpu")
MAX_REQUESTS, MAX_TOKENS = 4, 40
MIXED = make_plan(4, [[FULL_LANE, (1, 2)], [(1, 1), FULL_LANE]])


class Stage:
    """The worker's half of a step, up to where kernels read it."""

    def __init__(self, plan: PagePlan, gaps: bool = False) -> None:
        self.plan = plan
        self.tables = PageTables(plan, MAX_REQUESTS, MAX_TOKENS)
        self.rows = RowBuilder(plan, self.tables)
        mirror = TableMirror(self.tables, CPU)
        kernels = TritonDevice(CPU, 1)
        self.staging = DeviceStaging(kernels, mirror, plan.page_size, gaps)

    def run(self, batch: Batch, padding: int) -> tuple[StepRows, StagedRows]:
        self.tables.forget(batch.restarted)
        refresh(self.tables, batch)
        step = self.rows.build(batch.query_start, batch.seq_lens)
        tokens = int(batch.query_start[-1])
        if not isinstance(step.page_tables, list):
            tokens += padding
        return step, self.staging.stage(step, tokens)


def check(plan: PagePlan, step: StepRows, staged: StagedRows) -> None:
    """Compare everything that kernels may read."""
    own = step.slots.shape[1]
    assert torch.equal(staged.slots[:, :own], torch.from_numpy(step.slots))
    assert (staged.slots[:, own:] == -1).all()
    for layer, shape in enumerate(step.shape_of_layer):
        rows, expected = staged.rows[layer], step.shapes[shape]
        count = len(expected.seq_lens)
        assert rows.seq_lens[:count].tolist() == expected.seq_lens.tolist()
        assert not rows.seq_lens[count:].any()
        starts = rows.query_start.tolist()
        assert starts[: count + 1] == expected.query_start.tolist()
        assert len(starts) == len(rows.seq_lens) + 1
        assert np.diff(starts).max() <= rows.most_queries
        for row, tokens in enumerate(expected.seq_lens):
            pages = blocks_of(int(tokens), plan.page_size)
            found = staged.page_tables[layer][row, :pages].tolist()
            assert found == step.page_tables[layer][row, :pages].tolist()
    for (source, target), pair in zip(staged.copies, step.copies, strict=True):
        assert (source.tolist(), target.tolist()) == tuple(x.tolist() for x in pair)


@settings(max_examples=50)
@given(plans(), seeds())
def test_kernels_read_what_the_host_worked_out(plan: PagePlan, rng: Random) -> None:
    scheduler = Scheduler(plan, rng, MAX_REQUESTS, MAX_TOKENS, token_budget=24)
    stage = Stage(plan)
    for _ in range(12):
        batch = scheduler.next_batch()
        padding = rng.randrange(MAX_REQUESTS - len(batch.names) + 1)
        check(plan, *stage.run(batch, padding))
        scheduler.finish(batch)


@settings(max_examples=20)
@given(plans(), seeds())
def test_every_step_says_which_keys_its_rows_hide(plan: PagePlan, rng: Random) -> None:
    scheduler = Scheduler(plan, rng, MAX_REQUESTS, MAX_TOKENS, token_budget=24)
    stage, addresses = Stage(plan, gaps=True), set()
    for _ in range(8):
        batch = scheduler.next_batch()
        step, _ = stage.run(batch, padding=0)
        scheduler.finish(batch)
        for shape in step.shapes[rng.randrange(2) :]:
            ends = [
                sorted(rng.randint(0, int(n)) for _ in range(2)) for n in shape.seq_lens
            ]
            shape.gaps = np.array(ends, dtype=np.int32)
        is_decode = not isinstance(step.page_tables, list)
        tokens = MAX_REQUESTS if is_decode else int(batch.query_start[-1])
        staged = stage.staging.stage(step, tokens)
        for rows, shape in zip(staged.rows, step.shape_of_layer, strict=True):
            expected = step.shapes[shape].gaps
            if expected is not None:
                assert rows.gaps[: len(expected)].tolist() == expected.tolist()
                assert not rows.gaps[len(expected) :].any()
            else:
                assert not is_decode or not rows.gaps.any()
        if is_decode:
            addresses.add(tuple(rows.gaps.data_ptr() for rows in staged.rows))
    assert len(addresses) <= 1


def test_no_step_has_gaps_that_graphs_were_captured_without() -> None:
    scheduler = Scheduler(MIXED, Random(0), MAX_REQUESTS, MAX_TOKENS, token_budget=24)
    stage = Stage(MIXED)
    step = None
    while step is None or isinstance(step.page_tables, list):
        batch = scheduler.next_batch()
        step, staged = stage.run(batch, padding=0)
        scheduler.finish(batch)
    assert all(rows.gaps is None for rows in staged.rows)
    step.shapes[0].gaps = np.zeros((len(step.shapes[0].seq_lens), 2), dtype=np.int32)
    with pytest.raises(AssertionError, match="announced"):
        stage.staging.stage(step, MAX_REQUESTS)


def test_steps_of_one_size_reuse_their_memory() -> None:
    stage = Stage(MIXED)
    scheduler = Scheduler(MIXED, Random(0), MAX_REQUESTS, MAX_TOKENS, token_budget=24)
    addresses = set()
    for _ in range(60):
        batch = scheduler.next_batch()
        padding = MAX_REQUESTS - len(batch.names)
        step, staged = stage.run(batch, padding)
        scheduler.finish(batch)
        if not isinstance(step.page_tables, list):
            read = [staged.slots, *staged.page_tables]
            read += [x for r in staged.rows for x in (r.query_start, r.seq_lens)]
            addresses.add(tuple(tensor.data_ptr() for tensor in read))
    assert len(addresses) == 1


def test_a_step_without_requests_is_padding() -> None:
    staged = Stage(MIXED).staging.stage(None, 3)
    assert staged.num_decode_tokens == 3
    assert staged.slots.shape == (2, 6)
    assert (staged.slots == -1).all()
    assert not any(rows.seq_lens.any() for rows in staged.rows)


def test_arrays_uploaded_together_keep_shape_and_content() -> None:
    arrays = [np.arange(6).reshape(2, 3), np.zeros(0, dtype=int), np.array([7])]
    for array, tensor in zip(arrays, upload_all(arrays, CPU), strict=True):
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
    assert upload_all([], CPU) == []


def test_a_buffer_is_written_in_place() -> None:
    buffer = Buffer(8, torch.int32, CPU)
    first = buffer.put(np.ones((2, 3), dtype=np.int32))
    second = buffer.put(np.full((2, 3), 2, dtype=np.int32))
    assert first.data_ptr() == second.data_ptr()
    assert (first == 2).all()
