# SPDX-License-Identifier: Apache-2.0
"""The CPU's kernels over pages that they lay out themselves.

``--kv-cache-dtype`` asks for it, for a type that is not the model's: numbers are
rounded, and scaled where a page holds bytes, when they are written; attention
multiplies what pages hold, in float32. Rows with gaps ask for it where vLLM's kernel
has a layout that ours do not read (AMX).
"""

from __future__ import annotations

from functools import cached_property

import torch

from kvserve.engine.devices.cpu import CPUDevice
from kvserve.errors import UserError
from kvserve.kernels import native
from kvserve.kernels.page_formats import PageFormat


class ConvertingCPUDevice(CPUDevice):
    """Our own kernels alone: vLLM's know no such pages, or no gaps.

    Raises:
        UserError: the kernels do not take the model's shape, or were not compiled.
    """

    def __init__(
        self,
        page_format: PageFormat,
        dtype: torch.dtype,
        group_size: int,
        head_size: int,
        page_size: int,
    ) -> None:
        self._format = page_format
        super().__init__(dtype, group_size, head_size, page_size)
        if not self._has_kernels:
            raise UserError(
                f"--kv-cache-dtype={page_format.name}: kernels for such pages need a "
                "C++ compiler (install g++), a model in bfloat16 or float32, and heads "
                f"of a multiple of 32 numbers, not {head_size}; leave it out"
            )

    def _can_attend(self) -> bool:
        return native.can_attend(self._dtype, self._head_size, self._page_size)

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        # What was read from pages and moves on is float32 even if the model is not.
        native.write_pages(key, value, pool, slots)

    def _read(self, pool: torch.Tensor, pages: torch.Tensor, half: int) -> torch.Tensor:
        content = pool.view(len(pool), -1).index_select(0, pages.flatten())
        halves = self._format.halves(content, self._page_size)
        tokens = self._format.read(*halves[half])
        return tokens.view(*pages.shape, self._page_size, self._head_size)

    @cached_property
    def _key_places(self) -> torch.Tensor | None:
        return None
