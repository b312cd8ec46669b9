# SPDX-License-Identifier: Apache-2.0
"""Attention over head pages: ``benchmarks.cpu_rows``, or ``benchmarks.gpu_rows``.

The one for GPUs runs without vLLM, so neither is imported before it is chosen.

    python -m benchmarks.attention --kept 512 4096 --requests 1 16
    python -m benchmarks.attention --device cuda --context 32768
"""

from __future__ import annotations

import argparse


def main() -> None:
    """Measure on the device that ``--device`` names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen, options = parser.parse_known_args()
    if chosen.device == "cuda":
        from benchmarks import gpu_rows

        gpu_rows.main(options)
    else:
        from benchmarks import cpu_rows

        cpu_rows.main(options)


if __name__ == "__main__":
    main()
