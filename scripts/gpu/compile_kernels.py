# SPDX-License-Identifier: Apache-2.0
"""Compile our Triton kernels for the card, without one: ``ptxas`` comes with Triton.

Prints one line of JSON: how many programs were made, and the most shared memory that
one of them takes, in bytes.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from scripts.gpu import stub_card

SHARED_MEMORY = 227 << 10
"""What a program may have on Hopper."""
SHAPES = ((3, 64), (4, 128), (8, 128), (1, 32), (3, 32))
"""Query heads that share a KV head, and the head size."""
PAGE, ROWS, WIDTH = 32, 3, 64


def compile_all() -> list[tuple[str, int]]:
    """Name and shared memory of each program."""
    import torch
    from triton.runtime import jit

    from kvserve.kernels import triton_rows

    found, run = [], jit.JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        found.append((self.__name__, int(kernel.metadata.shared)))
        return kernel

    jit.JITFunction.run = noted
    for dtype, (group, size) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), SHAPES
    ):
        pool = torch.zeros(8, 1, PAGE, 2 * size, dtype=dtype)
        lengths = torch.full((ROWS,), 40, dtype=torch.int32)
        table = torch.zeros(ROWS, WIDTH, dtype=torch.int32)
        mass = triton_rows.Mass(torch.zeros(8, PAGE), torch.zeros(8, PAGE, group))
        for queries, longest, drawn in (
            (ROWS, 1, None),
            (ROWS, 1, mass),
            (98, 64, None),
            (98, 2048, None),
        ):
            query = torch.zeros(queries, group, size, dtype=dtype)
            starts = torch.tensor([0, 1, 2, queries], dtype=torch.int32)
            rows = starts, lengths, table
            out = torch.empty_like(query)
            triton_rows.row_attention(query, pool, *rows, 0.1, out, longest, mass=drawn)
        key = torch.zeros(5, size, dtype=dtype)
        triton_rows.write_rows(key, key, pool, torch.zeros(5, dtype=torch.int64))
        one = torch.tensor([1])
        triton_rows.copy_pages(pool, one, one)
    return found


def main() -> int:
    """Compile, and say what came of it."""
    stub_card.install()
    programs = compile_all()
    most = max(programs, key=lambda program: program[1])
    print(json.dumps({"programs": len(programs), "most_shared": most}))
    return int(most[1] > SHARED_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
