# SPDX-License-Identifier: Apache-2.0
"""What a head page may hold of a number, beside the model's own type.

A page of one-byte numbers has a float32 scale for each token's key and one for its
value, chosen as the token is written: the greatest number becomes the greatest that a
byte can say. vLLM calls that ``per_token_head``, since a page is of one head.

A page is numbers, then, where there are any, scales of keys and scales of values,
``[page_size]`` each. Numbers are keys ``[d, page_size]`` and values ``[page_size, d]``
for the CPU's kernels, and token by token ``[page_size, 2 * d]`` for a GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SCALE = 1e-6
"""Of a token of zeros, say, whose greatest number is nothing to divide by."""
_SCALE_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class PageFormat:
    """A type of page.

    Attributes:
        name: what ``--kv-cache-dtype`` calls it.
        pool: type of the pool's tensor.
        number: type of what a page holds.
        greatest: what the greatest number of a token becomes; 0 without scales.
    """

    name: str
    pool: torch.dtype
    number: torch.dtype
    greatest: float = 0.0

    @property
    def is_scaled(self) -> bool:
        """Tell whether tokens have scales."""
        return self.greatest > 0

    def token_bytes(self, head_size: int) -> int:
        """Bytes of a token's key and value, with their scales."""
        scales = 2 * _SCALE_BYTES if self.is_scaled else 0
        return 2 * head_size * self.number.itemsize + scales

    def pool_shape(
        self, pages: int, page_size: int, head_size: int
    ) -> tuple[int, int, int, int]:
        """Shape of the pool's tensor, ``[pages, 1, page_size, w]``."""
        width = self.token_bytes(head_size) // self.pool.itemsize
        return pages, 1, page_size, width

    def stored(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``tokens [..., d]`` as a page holds them, and scales ``[..., 1]``."""
        if not self.is_scaled:
            return tokens.to(self.number), None
        tokens = tokens.float()
        most = tokens.abs().amax(dim=-1, keepdim=True)
        scales = (most / self.greatest).clamp(min=LEAST_SCALE)
        numbers = tokens / scales
        if self.number == torch.int8:
            numbers = numbers.round()
        return numbers.clamp(-self.greatest, self.greatest).to(self.number), scales

    def read(self, numbers: Tensor, scales: Tensor | None) -> Tensor:
        """Return what :meth:`stored` numbers stand for, float32."""
        return numbers.float() if scales is None else numbers.float() * scales

    def round_trip(self, tokens: Tensor) -> Tensor:
        """Return ``tokens [..., d]`` as attention sees them, float32."""
        return self.read(*self.stored(tokens))

    def halves(
        self, content: Tensor, page_size: int
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Split pages of a CPU into keys and values, with their scales.

        Args:
            content: ``[n, w]``, whole pages, of the pool's type.

        Returns:
            Twice numbers ``[n, page_size, d]`` and scales ``[n, page_size, 1]``.
        """
        numbers, (of_keys, of_values) = self._parts(content, page_size)
        keys, values = numbers.chunk(2, dim=1)
        keys = keys.view(len(content), -1, page_size).transpose(1, 2)
        values = values.view(len(content), page_size, -1)
        return (keys, of_keys), (values, of_values)

    def halves_of_tokens(
        self, content: Tensor, page_size: int
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Split pages of a GPU; arguments and result as of :meth:`halves`."""
        numbers, (of_keys, of_values) = self._parts(content, page_size)
        keys, values = numbers.view(len(content), page_size, -1).chunk(2, dim=2)
        return (keys, of_keys), (values, of_values)

    def _parts(
        self, content: Tensor, page_size: int
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """Numbers ``[n, page_size * 2 * d]``; scales of keys, and of values."""
        scale_bytes = 2 * page_size * _SCALE_BYTES if self.is_scaled else 0
        size = content.shape[1] - scale_bytes
        numbers = content[:, :size].contiguous().view(self.number)
        if not self.is_scaled:
            return numbers, (None, None)
        scales = content[:, size:].contiguous().view(torch.float32)
        of_keys, of_values = scales.view(len(content), 2, page_size, 1).unbind(1)
        return numbers, (of_keys, of_values)


def plain(dtype: torch.dtype) -> PageFormat:
    """Return the format of pages that hold numbers of a model's type as they are."""
    return PageFormat(str(dtype).removeprefix("torch."), dtype, dtype)


BFLOAT16 = plain(torch.bfloat16)
INT8 = PageFormat("int8_per_token_head", torch.int8, torch.int8, 127.0)
FP8 = PageFormat("fp8_per_token_head", torch.uint8, torch.float8_e4m3fn, 448.0)
FORMATS = {known.name: known for known in (BFLOAT16, INT8, FP8)}
"""Formats that need not be the model's own type, by name."""
