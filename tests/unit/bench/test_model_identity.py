# SPDX-License-Identifier: Apache-2.0
"""What the table of replies says of two engines."""

from __future__ import annotations

import pytest

from benchmarks.model_identity import Comparison, Reply

STOCK = Reply([5, 6, 7], [{5: -0.1, 1: -3.0}, {6: -0.5, 2: -0.6}, {7: -1.0, 3: -2.0}])


def test_replies_that_are_equal_differ_by_rounding_at_most() -> None:
    steps = [{5: -0.1, 1: -3.0}, {6: -0.51, 2: -0.6}, {7: -1.0, 3: -2.0}]
    found = Comparison.of(9, STOCK, Reply([5, 6, 7], steps), "text")
    assert found.equal == 3
    assert found.parted is None
    assert found.difference == pytest.approx(0.01)
    assert found.row(3) == ["9", "3 of 3", "1.0e-02", "0.100", "-"]


def test_replies_part_where_two_tokens_are_as_likely() -> None:
    steps = [{5: -0.1, 1: -3.0}, {6: -0.6, 2: -0.55}, {8: -1.0, 3: -2.0}]
    found = Comparison.of(9, STOCK, Reply([5, 2, 8], steps), "text")
    assert found.equal == 1
    assert found.difference == 0
    assert found.parted == pytest.approx((0.1, 0.05))
    assert found.row(3)[-1] == "0.100 and 0.050"
