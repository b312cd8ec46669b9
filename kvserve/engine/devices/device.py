# SPDX-License-Identifier: Apache-2.0
"""The calls that differ between devices, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from kvserve.engine.batch.rows import RowShapes
from kvserve.kernels import statistics
from kvserve.kernels.score_form import Positions, ScoreForm
from kvserve.kernels.statistics import CachedRows


class Device(ABC):
    """Writes head pages and attends to them, row by row.

    A pool is ``[num_pages, 1, page_size, 2 * head_size]``; what lies inside a page is
    the device's own affair, so everybody else moves whole pages.
    """

    @abstractmethod
    def plan_rows(self, shapes: RowShapes) -> Any:
        """Prepare what kernels want to know of rows, once for all alike layers."""

    @abstractmethod
    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Store keys and values ``[n, head_size]`` at ``slots [n]``."""

    def read_keys(self, pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Return keys of ``pages``, ``[*pages.shape, page_size, D]``."""
        return self._read(pool, pages, 0)

    def read_values(self, pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Return values of ``pages``, ``[*pages.shape, page_size, D]``."""
        return self._read(pool, pages, 1)

    @abstractmethod
    def _read(self, pool: torch.Tensor, pages: torch.Tensor, half: int) -> torch.Tensor:
        """Return the keys, half 0, or the values of ``pages``."""

    @abstractmethod
    def prepare_statistics(self, pool: torch.Tensor) -> None:
        """Get the three calls below ready, before the first request."""

    def attention_mass(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        form: ScoreForm | None = None,
    ) -> torch.Tensor:
        """As ``kernels.statistics`` says, which does it unless a device is faster."""
        return statistics.attention_mass(query, key, scale, form)

    @abstractmethod
    def add_row_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        cached: CachedRows,
        scale: float,
        mass: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        """As ``kernels.statistics`` says, with the keys of ``pool``."""

    def lightest_slots(
        self,
        cached: CachedRows,
        mass: torch.Tensor,
        position: torch.Tensor,
        own: torch.Tensor,
        safe_from: torch.Tensor,
        by_count: bool,
    ) -> torch.Tensor:
        """As ``kernels.statistics`` says, which does it unless a device is faster."""
        token_state = mass, position, own, safe_from
        return statistics.lightest_slots(cached, *token_state, by_count)

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        rows: Any,
        page_table: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        form: ScoreForm | None = None,
        positions: Positions | None = None,
    ) -> None:
        """Run causal attention of ``query [tokens, H_q, head_size]`` into ``out``.

        Args:
            form: how the model scores; one that is supported.
            positions: of tokens and slots; a form's slopes ask for them.
        """

    @property
    def supports_gaps(self) -> bool:
        """Tell whether rows may hide keys (``RowShapes.gaps``) from their queries."""
        return False

    def supports(self, form: ScoreForm) -> bool:
        """Tell whether the kernels that serve here score as a model asks for."""
        return True
