# SPDX-License-Identifier: Apache-2.0
"""What a cache of few bits makes of keys and values: the nearest of a list of numbers.

Slow on purpose: every number is compared with every number that a byte can say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_SCALE = 1e-6


def int8_numbers() -> list[float]:
    """What an int8 says, without -128: both signs reach as far."""
    return [float(number) for number in range(-127, 128)]


def e4m3_numbers() -> list[float]:
    """What a byte of sign, four bits of exponent and three of fraction says.

    OFP8, section 5: the exponent's bias is 7, exponent 0 is subnormal, and there are no
    infinities: only a byte of all ones is not a number.
    """
    sizes = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    for exponent in range(1, 16):
        fractions = range(7 if exponent == 15 else 8)
        sizes += [(1 + fraction / 8) * 2.0 ** (exponent - 7) for fraction in fractions]
    return sorted({sign * size for sign in (-1, 1) for size in sizes})


def nearest(numbers: list[float], tokens: Tensor) -> Tensor:
    """Return the nearest number to each of ``tokens``; of two, that of even place.

    Zero has an even place, and so have all whose last bit is 0.
    """
    table = torch.tensor(numbers, dtype=torch.float64)
    is_even = (torch.arange(len(table)) - len(table) // 2) % 2 == 0
    far = (tokens.double()[..., None] - table).abs()
    is_nearest = far == far.amin(dim=-1, keepdim=True)
    return table[(is_nearest.int() + (is_nearest & is_even).int()).argmax(dim=-1)]


def per_token_head(numbers: list[float]) -> Callable[[Tensor], Tensor]:
    """Return what rounds ``[..., d]`` so that a token's greatest is the list's."""

    def rounded(tokens: Tensor) -> Tensor:
        greatest = tokens.abs().amax(dim=-1, keepdim=True)
        scale = (greatest / numbers[-1]).clamp(min=LEAST_SCALE)
        return nearest(numbers, tokens / scale).float() * scale

    return rounded


def bfloat16(tokens: Tensor) -> Tensor:
    """Round to 8 bits of fraction."""
    return tokens.bfloat16().float()


CACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": bfloat16,
    "int8_per_token_head": per_token_head(int8_numbers()),
    "fp8_per_token_head": per_token_head(e4m3_numbers()),
}
"""By the name that ``--kv-cache-dtype`` takes."""
